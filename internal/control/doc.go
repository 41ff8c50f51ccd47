// Package control is how "conenatd list" and "conenatd status" talk to the running daemon:
// HTTP over a unix socket, one socket for each network namespace. It also makes sure that a
// network namespace has only one daemon.
//
// docs/control.md describes each request and answer, and a test compares the two.
//
// The package itself changes nothing in the kernel. It knows of the daemon only the
// interface Source, through which it carries out requests.
package control
