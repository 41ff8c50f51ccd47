// Package rules keeps conenatd's own nftables table, and reads what other
// tables forward.
//
// The table holds three chains:
//
//   - guard drops new UDP packets from outside links that no socket of the
//     gateway waits for, after the user's input rules and before conntrack
//     makes an entry of them. Such an entry would keep the peer from the inside
//     host for as long as it sends.
//   - children bounds the flows that one permission can have at a time.
//   - port_zero drops UDP packets with port 0 before conntrack sees them, for
//     only anchors have that port, and a packet must never match one.
//
// Its family is inet: the same rules then serve IPv4 and IPv6, which conntrack
// expectations do too. It has no NAT chain. One of family inet would put all
// IPv6 flows of the gateway through NAT; so DNAT belongs into a second table,
// "ip conenat", beside this one.
//
// The package never touches another table, nor this one when conenatd did not
// make it. All changes are one transaction: a packet meets the old rules or the
// new ones.
//
// On 32-bit systems it offers nothing and says so: the library for nftables,
// at the version that works, does not compile there.
package rules
