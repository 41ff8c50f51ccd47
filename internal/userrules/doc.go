// Package userrules reads what the user's firewall does, and never changes it: rules of
// nftables, which include those of iptables-nft, and rules of iptables-legacy.
//
// A Reader reads the rules again and again into a Ruleset, and decodes only those that
// changed. All questions go to the Ruleset, which is a value: answers need neither the
// kernel nor privileges.
//
//   - Forwards: which destinations are translated, or go to a transparent proxy, and so get no
//     expectation.
//   - Diversions: which ports of peers rules take from inside hosts, by translation or for a
//     conntrack helper, so that no flow of the peer may take their place.
//   - SourceNAT, FixedSources, PortChoosers, Uplinks: which sources are translated, to
//     which addresses and ports, and on which links.
//   - Chains: hook and priority of the chains that translate packets, or that packets from
//     outside pass.
//   - Children: what the prerouting and forward hooks do with RELATED flows and with new flows
//     that are translated after the user's own forwards.
//   - Marker: which marks packets have when they are routed.
//
// Two analyses follow packets through chains. The walker narrows a condition and never
// reports less than a rule translates. The hookWalk takes a class of packets, of which some
// bits are known, and reports what may become of them. The markWalk is a hookWalk that follows
// the marks of one packet, too. What neither can follow is unknown, never "no".
//
// Of conenatd's own tables the package knows only the name of a chain in them, by which it
// skips these tables.
package userrules
