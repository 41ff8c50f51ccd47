package expect

import (
	"fmt"

	"github.com/conenatd/conenatd/internal/cone"
	"golang.org/x/sys/unix"
)

// List calls f for every permission that stands in the kernel, made by this or
// an earlier daemon. Marks are not known. It has a connection of its own and
// may run beside all other methods.
func (b *Backend) List(f func(cone.Permission)) error {
	return list(b.cfg.NetNS, func(x *expectation) { f(x.permission()) })
}

// list calls f for every expectation that is ours.
func list(netns int, f func(*expectation)) error {
	c, err := dial(netns)
	if err != nil {
		return err
	}
	defer c.close()
	var e encoder
	seq := c.nextSeq(1)
	e.message(subsysExpect, msgGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, seq, false)
	e.b[e.last+unix.NLMSG_HDRLEN] = unix.AF_UNSPEC
	e.end()
	var refused error
	err = c.exchange(e.b, seq, func(_ uint32, err error) { refused = err }, func(typ uint16, body []byte) {
		if typ != subsysExpect<<8|msgNew {
			return
		}
		if x, ok := parseExpectation(body); ok && x.ours() {
			f(&x)
		}
	})
	if err == nil {
		err = refused
	}
	if err != nil {
		return fmt.Errorf("list expectations: %w", err)
	}
	return nil
}
