// Package probe finds out on a host how the NAT and the firewall in front of it treat UDP:
// mapping, filtering and hairpinning as RFC 4787 names them, by the tests of RFC 5780.
//
// It sends STUN requests to the server that the caller names, to the other address of that
// server, and, for hairpinning, to its own outside endpoint. It contacts nobody else, needs
// no privilege and changes nothing. The files are in the order of the work: server.go reads
// the name of the server, exchange.go sends and receives, measure.go runs the tests,
// classify.go draws the conclusions and is pure, words.go says what they mean.
package probe
