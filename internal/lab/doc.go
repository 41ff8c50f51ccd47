// Package lab makes throw-away gateway labs in network namespaces. The demo,
// the selftest and the end-to-end tests run in them.
//
//	inside hosts              gateway                     outside
//	10.47.11.109, .110 ... -- lan0   10.47.11.1
//	guest 10.47.12.20 ------- guest0 10.47.12.1
//	                          wan0   198.51.100.1 ------- 198.51.100.254
//	                                                      203.0.113.0/24
//	                                                      192.0.2.0/24
//
// All peers live in the one outside namespace: each address of the two
// documentation prefixes (RFC 5737) is local there and can be bound.
// With [Options.IPv6] the networks are 2001:db8:47::/64 (inside),
// 2001:db8:48::/64 (guest), 2001:db8:ffff::/64 (outside link) and
// 2001:db8:5::/64 (peers), routed and not translated.
//
// The namespaces are anonymous: only a file descriptor of this process holds them,
// so a lab ends with the process, however that ends. Only a program that was
// started in a lab and still runs keeps its own namespace. The machine's interfaces
// and rules are never touched; even the veth pairs are made inside the lab.
//
// This is the only package outside the tests that runs other programs: ip, nft and
// conntrack always, iptables on request. It needs CAP_SYS_ADMIN and CAP_NET_ADMIN; those
// of a user namespace ("unshare -r") are enough.
package lab
