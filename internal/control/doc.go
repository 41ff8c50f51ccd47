// Package control is how "conenatd list" and "conenatd status" talk to the
// running daemon: HTTP over a unix socket, one socket for each network
// namespace. It also keeps the rule that a network namespace has one daemon.
//
// docs/control.md describes each request and answer, and a test compares the two.
//
// The package itself changes nothing in the kernel. It knows nothing of the daemon
// but what a Source tells, and asks it for what a request wants.
package control
