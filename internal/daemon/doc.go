// Package daemon is the one loop: conntrack events go to the model (package
// cone), and what the model decides goes to a backend.
//
// One goroutine, the loop, owns the event socket, the model and the backend.
// Any other goroutine that needs them hands the loop a function and wakes it.
// The reconcile runs beside the loop: it reads the conntrack table, the links,
// the local sockets and what stands in the kernel, and hands the loop what it
// found in small pieces, so that an event never waits long.
//
// The package never sees a packet, and keeps no state that it cannot read back from
// the kernel: killed and started again, it finds everything there.
package daemon
