// Package budget limits the CPU time of work that others cause, such as looks at a ruleset
// that a busy neighbour changes all the time. It measures the work, and says when the next
// piece may begin; the caller does the work and keeps the time.
package budget
