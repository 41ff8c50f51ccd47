// Package engine is the body of the daemon's loop. It carries out what the model (package
// cone) decides, tells the model how the kernel answered, and compares the permissions that
// should stand with those that do.
//
// It knows the kernel only through the interfaces in kernel.go, so it runs against a fake
// kernel as well. It has no clock of its own, starts no goroutine and opens no socket.
package engine
