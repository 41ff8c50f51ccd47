// Package nfnl is the netlink kit of the project: it sends requests to nfnetlink, rtnetlink
// and sock_diag, and reads the kernel's answers without allocating. It has what these
// messages have in common: the request loop, attributes in both directions, and the tuples
// of conntrack. The messages themselves are those of its users.
package nfnl
