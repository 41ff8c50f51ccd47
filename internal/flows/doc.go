// Package flows judges the flows in the conntrack table by the user's rules and by the gateway's
// routes and addresses: by which links a flow leaves, and whether its outside address is one that
// the rules would give it there. It finds
//
//   - broken flows, which leave with another source than rules give now ([Search]);
//   - flows with mappings, and children, whose outside address is gone or on another link than the
//     one by which they leave ([Fixed], [Strands]). The kernel ends the flows of a masquerade in
//     such a case, but not these.
//
// What is not sure is never wrong. A value is for one goroutine at a time.
package flows
