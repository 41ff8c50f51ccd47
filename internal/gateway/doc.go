// Package gateway reads what the gateway itself is: its links, addresses and routes, and
// the ports that its own UDP sockets hold.
//
// It changes nothing, and needs no privilege except to enter another network namespace. It
// decides nothing either: package cone says who gets a permission.
package gateway
