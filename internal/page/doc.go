// Package page serves a small read-only page for people: whether conenatd works, what its
// packets go through, who may send to whom, and what happens right now.
//
// It shows what "conenatd status", "list" and "watch" show, in the same words, and has no
// state of its own. It asks the daemon only while somebody looks, at most once a second for
// all clients together. The caller must refuse foreign names in the Host header.
package page
