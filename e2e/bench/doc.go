// Command bench measures what conenatd costs and writes docs/results/bench.md ("make bench").
//
// Each arm is a gateway with hosts in network namespaces of its own (package lab): without
// conenatd, with a few rules of nft written by hand, and with conenatd in each of its modes.
// Arms are measured in quads, A B B A, where A is the arm that the others are compared with:
// drift of the machine that is linear over a quad cancels out. Each quad gives one ratio. A
// table prints the median of the ratios of all quads and a confidence interval of the median
// from order statistics. Before the others, A is measured against a second gateway of the same
// kind (A/A): what this ratio misses 1 by widens all intervals when they are compared with a
// goal.
//
// A cost is the CPU time of the thread that sends the packets, which is bound to the last CPU:
// the links of a lab do not queue, so this thread carries each packet through the gateway.
// Programs in the gateway are bound to the first CPU.
//
// While any program listens to conntrack events, in whatever network namespace, the kernel
// builds events for new flows in all of them. So the program measures nothing while a listener
// exists that it did not start; see listeners.go.
//
// It sends nothing out of its own namespaces, and changes nothing outside them.
package main
