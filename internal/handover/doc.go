// Package handover is what one process of conenatd tells the next one in the same network
// namespace, by files beside the control socket: which settings of conntrack it raised, what
// the user revoked, and which flows have a source that may be spoofed. The kernel cannot tell
// these after a clean stop, or without nftables. Everything else is read back from the kernel.
package handover
