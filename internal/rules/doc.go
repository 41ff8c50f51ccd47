// Package rules keeps conenatd's own nftables tables. Package userrules reads what the
// user's rules do.
//
// The table of family inet serves IPv4 and IPv6, as conntrack expectations do:
//
//   - guard drops new UDP packets from outside links for which the gateway has no socket.
//     It comes after the user's input rules and before conntrack confirms an entry. Such an
//     entry would lock the peer out from the inside host for as long as the peer sends.
//   - spoofed drops UDP packets that come by an outside link with the source of an inside
//     host, if that link is not the way back to the source. It comes before conntrack: such
//     packets would earn that host a permission, or keep one alive.
//   - children judges the first packets of flows that expectations on anchors let in. It
//     recognises them by the helper. It drops those that came by no outside link, because
//     only a spoofer sends them, and limits the flows of one expectation at a time. It also
//     drops ICMP errors about an anchor.
//   - way_back remembers IPv6 flows of inside hosts whose first packet came by another link
//     than the way back to the source. The source may be spoofed, so these flows earn no
//     permission.
//   - helped remembers between which hosts conntrack helpers of the user's work, before they can
//     drop a packet because an expectation of ours is where they want theirs.
//   - port_zero drops UDP packets that look like an anchor (port 0, between a subnet and
//     elsewhere) before conntrack sees them.
//
// None of them touches a family without an enabled subnet.
//
// The table of family ip is the nft backend; its chain way_back serves expectations, too.
// It is a separate table because a NAT chain of family inet would put all IPv6 flows of the
// gateway through NAT:
//
//   - permissions is a map from outside endpoint and peer to inside endpoint.
//   - marks is a map with the same keys to the connmarks that children inherit.
//   - admit translates packets that match the map, after all of the user's NAT chains. Like
//     any NAT chain it sees the first packet of a flow only.
//   - way_back does for IPv4 what the chain above does for IPv6.
//   - keep_source keeps the peer's address in flows that admit let in.
//   - learn adds a permission to the map from the first packet of a flow, while that packet
//     is still inside. It skips permissions in the set denied.
//
// The same table keeps one outside endpoint for each inside endpoint and outside link, and
// gives that endpoint to no other inside endpoint:
//
//   - map_source, before the user's source NAT, translates packets that have a mapping, and
//     moves those that would share a port to a pool. It leaves the rest to the user's
//     rules.
//   - remember, behind the user's source NAT, learns mappings from the first packet of a
//     flow. Together with arrivals it learns which other flows use an outside port.
//   - hairpin sends packets from inside to an outside endpoint to its owner.
//
// Rules contain only what nft itself can write, so that each version of nft lists them as
// they are and can load its own listing. Therefore a rule that names a port of conntrack
// tests for UDP itself, a rule always uses the value of a map lookup, and no value begins
// with a mark. A loaded copy has no signatures, so the next start makes the rules anew.
//
// Package elements writes the sets whose elements come and go.
//
// The package never touches another table, nor a table of our name that conenatd did not
// make. All changes are one transaction: a packet meets the old rules or the new ones.
//
// A layout is the contents of one of our tables, as a value. It can be compared with the
// kernel's table, sent, and printed in nft's syntax (Text).
//
// The library google/nftables makes tables and rules. This package encodes what the library
// cannot do: it does not read back expressions that it does not know, so rules are compared
// by a hash in their user data; it does not write the byte order of a map's values (marks);
// and it cannot ask for the number of the last transaction.
package rules
