// Package control is how "conenatd list" and "conenatd status" talk to the
// running daemon: HTTP over a unix socket, one socket for each network
// namespace. It also keeps the rule that a network namespace has one daemon.
//
//	GET /v1/status       one Status
//	GET /v1/permissions  one Permission per line (NDJSON), in no order
//
// An error is an object with the one member "error". Within v1 members are
// added, never changed or removed.
//
// The package only reads: no request changes the daemon or the kernel. It
// knows nothing of the daemon but what a Source tells.
package control
