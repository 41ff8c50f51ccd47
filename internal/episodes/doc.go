// Package episodes logs abnormal conditions without flooding the log: one line when a
// condition begins, one whenever it has grown tenfold, and one when it is over. It counts the
// failures of requests to the kernel, and logs warnings when they arise and are over.
package episodes
