// Package control is how "conenatd list" and "conenatd status" talk to the
// running daemon: HTTP over a unix socket, one socket for each network
// namespace. It also keeps the rule that a network namespace has one daemon.
//
//	GET  /v1/status                  one Status
//	GET  /v1/permissions             one Permission per line (NDJSON), in no order
//	GET  /v1/verify                  one Verification, or an error in its place
//	POST /v1/reload                  reads the configuration again
//	POST /v1/revoke?word=W[&word=W]  ends the permissions that fit all words
//	POST /v1/flush                   ends all permissions
//
// The last two answer with an object that has the number of permissions as
// "revoked". An error is an object with the one member "error". Within v1 members
// are added, never changed or removed.
//
// The package itself changes nothing in the kernel. It knows nothing of the daemon
// but what a Source tells, and asks it for what a request wants.
package control
