package expect

import "github.com/conenatd/conenatd/internal/cone"

// UseHelper makes b use another helper for IPv4, which the kernel may not know.
func (b *Backend) UseHelper(name string) { b.helpers.v4.name = name }

// DeleteExpectation takes the expectation of p alone out of the kernel.
func (b *Backend) DeleteExpectation(p *cone.Permission) error {
	return b.exchange(func(seq uint32) { b.enc.deleteExpect(seq, &p.Key) })[0]
}

// Unwanted lets b find that the kernel failed to remove p.
func (b *Backend) Unwanted(p *cone.Permission) {
	a, _, _ := b.standing.of(p)
	b.standing.unwanted[a] = *p
}
