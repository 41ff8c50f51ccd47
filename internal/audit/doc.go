// Package audit writes the audit log: the begin and the end of each mapping and of each flow
// that a peer opened, with the fields that RFC 6888 section 4 asks for. docs/audit.md
// describes the file.
//
// A Log belongs to one goroutine, except for Replace. It never asks the kernel.
package audit
