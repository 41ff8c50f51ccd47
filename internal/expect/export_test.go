package expect

import "github.com/conenatd/conenatd/internal/cone"

// LoseHelper makes b use a helper that the kernel does not know.
func (b *Backend) LoseHelper() { b.helpers.v4.name = "conenat-lost" }

// DeleteExpectation takes the expectation of p alone out of the kernel.
func (b *Backend) DeleteExpectation(p *cone.Permission) error {
	return b.three(func(seq uint32) { b.enc.deleteExpect(seq, &p.Key) })[0]
}
