// Package gateway answers what the gateway itself is: its links, addresses and
// routes, and the ports that its own UDP sockets hold.
//
// It reads and changes nothing, and needs no privilege but to enter another
// network namespace. It decides nothing either: package cone says who gets a
// permission.
package gateway
