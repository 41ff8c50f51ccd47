// Package ctwatch reads the kernel's connection tracking table: a Watcher
// hears of UDP flows that begin and end, Queries dumps, looks up and deletes
// single entries. Both speak ctnetlink and give cone.Flow values. Statistics reads
// what the kernel counts, by ti-mo/conntrack.
//
// The way of an event allocates nothing: a socket filter in the kernel drops
// what is not ours, one read fills a buffer that stays, and a parser by hand
// takes the few attributes that conenatd needs. Read and decoded, an event takes 1.8 µs
// and no allocation; by ti-mo/conntrack it would be 9.9 µs and 69
// (docs/adr/0003-own-decoder.md).
//
// The package never creates or changes a conntrack entry, never deletes one
// except by its tuple and id together, and never sees a packet. It keeps no
// state about flows, does not log and starts no goroutine.
package ctwatch
