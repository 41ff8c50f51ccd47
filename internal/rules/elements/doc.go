// Package elements reads and writes the elements of the sets in conenatd's own nftables
// tables, in batches: permissions (Map), denials, mappings (Mappings), and flows whose
// source may be spoofed (Unsure). Package rules makes the tables, and names the sets as
// this package does.
//
// It encodes its messages itself, over nfnl: a library for nftables allocates for each
// element, does not tell which element of a batch the kernel refused, and asks for no
// element by its key.
//
// Nothing here makes or deletes a set.
package elements
