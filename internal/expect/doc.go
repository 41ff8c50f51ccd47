// Package expect makes permissions stand as conntrack expectations.
//
// A permission is an anchor and an expectation on it. The anchor is a
// conntrack entry of our own, inside address to peer, with a port that real
// packets do not use and a helper that never sees a packet. The expectation
// says: from the peer, any port, to the outside endpoint; the kernel's function
// nat-follow-master then sends the packet to the inside endpoint. The real flow
// is never touched.
//
// The package decides nothing: package cone says what stands. It keeps only
// what it needs to address its entries, and to hold the caps that the kernel's
// expectation table demands. It never deletes without a full tuple, since that
// would flush the whole table, and it never deletes what is not its own.
package expect
