// Package nfnl sends batches of nfnetlink messages and reads the kernel's answers, without
// allocating. It is what packages such as expect and rules have in common, and knows none
// of their messages.
package nfnl
