// Package conetest has what the random tests of the model and of the engine share.
package conetest

// Choices is a source of numbers that a fuzzer chooses, one byte each (math/rand/v2.Source).
// When all bytes are used it returns the same number for ever.
type Choices struct{ Left []byte }

// Uint64 returns the next number.
func (c *Choices) Uint64() uint64 {
	const low = 1<<56 - 1 // of a number that rand.IntN takes at once
	if len(c.Left) == 0 {
		return low
	}
	b := c.Left[0]
	c.Left = c.Left[1:]
	return uint64(b)<<56 | low
}
