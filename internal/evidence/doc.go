// Package evidence judges by what became of children whether the user's firewall lets them
// pass: it compares how many the kernel's rules admitted with how many conntrack confirmed. The
// caller reads the counts and keeps the time; the package does no I/O.
package evidence
