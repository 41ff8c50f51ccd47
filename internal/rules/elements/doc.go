// Package elements reads and writes the elements of the sets in conenatd's own nftables
// tables, in batches: permissions (Map), denials, mappings (Mappings), and flows whose
// source may be spoofed (Unsure). Package rules makes the tables, with the set names from
// this package.
//
// It encodes its messages itself, over nfnl: the nftables library allocates for each
// element, does not report which element of a batch the kernel refused, and cannot look up
// an element by its key.
//
// Nothing here makes or deletes a set.
package elements
