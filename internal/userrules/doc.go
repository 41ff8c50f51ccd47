// Package userrules reads what the user's firewall does, and never changes it: rules of
// nftables, among them those of iptables-nft, and of iptables-legacy.
//
// A Reader reads them again and again into a Ruleset, and decodes only what is another than
// before. All questions are asked to the Ruleset, which is a value: the answers need
// neither the kernel nor privilege.
//
//   - Forwards: what is translated to other destinations, and so gets no permission.
//   - SourceNAT, FixedSources, PortChoosers, Uplinks: what is translated to other sources,
//     to which addresses and ports, and by which links.
//   - Chains: hook and priority of the chains that translate, or that forwarded packets
//     pass.
//   - Children: what the forward hook does with RELATED flows and with new ones that were
//     translated.
//
// Two analyses follow packets through chains. The walker narrows a condition and never
// says less than a rule translates. The hookWalk takes a class of packets, of which some
// bits are known, and says what may become of them. What neither can follow is unknown,
// never "no".
//
// Conntrack helpers that rules assign are not read: they are in chains that nothing else
// here depends on, and a flow tells that it has one.
//
// The package knows nothing of conenatd's own tables but the name of a chain that they
// have: it does not read them.
package userrules
