// Package rules keeps conenatd's own nftables tables. What the user's rules do is the
// subject of package userrules.
//
// The table of family inet serves IPv4 and IPv6, as conntrack expectations do:
//
//   - guard drops new UDP packets from outside links that no socket of the
//     gateway waits for, after the user's input rules and before conntrack
//     makes an entry of them. Such an entry would keep the peer from the inside
//     host for as long as it sends.
//   - spoofed drops UDP packets from outside links with the source of a host that is
//     inside and no way back by that link, before conntrack sees them: they would earn
//     that host a permission, or keep one alive.
//   - children judges the first packets of flows that expectations on anchors let in,
//     which it knows by the helper: it drops what came by no outside link, for only a
//     faker sends that, and bounds the flows of one expectation at a time. It also drops
//     ICMP errors about an anchor.
//   - way_back remembers the IPv6 flows of inside hosts that begin by another link than the
//     way back to them, for their source may be spoofed: they earn nothing.
//   - port_zero drops UDP packets like an anchor before conntrack sees them: between a
//     subnet and elsewhere, with port 0.
//
// None of them touches a family without an enabled subnet.
//
// The table of family ip is the nft backend, but for way_back, which serves expectations,
// too. A NAT chain of family inet would put all IPv6 flows of the gateway through NAT, so
// it is a table of its own:
//
//   - permissions is a map from outside endpoint and peer to inside endpoint.
//   - marks is a map with the same keys to the connmarks that children inherit.
//   - admit translates what the map knows, after every NAT chain of the user's. Like
//     any NAT chain it sees the first packet of a flow only.
//   - way_back does so for IPv4.
//   - keep_source keeps the peer's address for what admit let in.
//   - learn adds to the map what the first packet of a flow gives, while that
//     packet is still inside, but not what is in the set denied.
//
// Apart from these it keeps one outside endpoint for each inside endpoint and
// outside link, and gives it to no other one:
//
//   - map_source, before the user's source NAT, translates what has a mapping, and
//     moves to a pool what would share a port. All else is left to the user's rules.
//   - remember, behind the user's source NAT, learns mappings from the first packet
//     of a flow, and with arrivals what else uses an outside port.
//   - hairpin sends packets from inside to an outside endpoint to its owner.
//
// Rules have only what nft itself can write, so that each version of it lists them as
// they are, and loads what it lists: a rule that names a port of conntrack tests for UDP
// itself, look-ups in maps give a value that the rule uses, and no value begins with a
// mark. A loaded copy has no signatures, so the next start makes the rules anew.
//
// What is in the sets whose elements come and go is written by package elements.
//
// The package never touches another table, nor these when conenatd did not
// make them. All changes are one transaction: a packet meets the old rules or the
// new ones.
//
// A layout is the contents of one of our tables, as a value. It is compared with what
// stands, sent, and printed in nft's syntax (Text).
//
// The library google/nftables makes tables and rules. What it cannot do is encoded here:
// it reads back no expression that it does not know, so rules are compared by a hash in
// their user data; it does not write the byte order of a map's values (marks); and it has
// no request for the number of the last transaction.
//
// On 32-bit systems it offers nothing and says so: the library for nftables,
// at the version that works, does not compile there.
package rules
