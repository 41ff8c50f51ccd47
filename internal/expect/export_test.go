package expect

import "github.com/conenatd/conenatd/internal/cone"

// UseHelper makes b use another helper for IPv4, which the kernel may not know.
func (b *Backend) UseHelper(name string) { b.helpers.v4.name = name }

// DeleteExpectation takes the expectation of p alone out of the kernel.
func (b *Backend) DeleteExpectation(p *cone.Permission) error {
	return b.three(func(seq uint32) { b.enc.deleteExpect(seq, &p.Key) })[0]
}
