// Package nfnl sends batches of nfnetlink messages and reads what the kernel
// answers, without allocating: the part that package expect and package rules
// share. It knows no message of either.
package nfnl
