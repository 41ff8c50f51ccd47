package expect

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// List calls f for every permission that stands in the kernel, made by this or an earlier
// daemon, with the time it has left. Its Mark may be missing. List has a connection of its
// own and may run beside all other methods.
func (b *Backend) List(f func(p cone.Permission, left time.Duration)) error {
	return b.ListAll(f, func(cone.Foreign) {})
}

// ListAll does what List does, and calls foreign for all other expectations.
func (b *Backend) ListAll(f func(p cone.Permission, left time.Duration), foreign func(cone.Foreign)) error {
	return listAll(b.cfg.NetNS, b.zoned.Load(), func(x *expectation) { f(x.permission(), x.left()) }, foreign)
}

// list calls f for every expectation that is ours. If whole is set it finds out zones and
// marks too, which costs a dump of all conntrack entries; otherwise it takes all to be in
// the default zone.
func list(netns int, whole bool, f func(*expectation)) error {
	return listAll(netns, whole, f, func(cone.Foreign) {})
}

// listAll is list, and calls foreign for every expectation that is not ours.
func listAll(netns int, whole bool, f func(*expectation), foreign func(cone.Foreign)) error {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	xs, err := listExpectations(c, foreign)
	if err == nil && whole && len(xs) > 0 {
		xs, err = join(c, xs)
	}
	if err != nil {
		return err
	}
	for i := range xs {
		f(&xs[i])
	}
	return nil
}

func listExpectations(c *nfnl.Conn, foreign func(cone.Foreign)) ([]expectation, error) {
	var xs []expectation
	var others []cone.Foreign
	err := nfnl.Uninterrupted(func() error {
		var e encoder
		e.Message(subsysExpect, msgGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), unix.AF_UNSPEC)
		e.End()
		xs, others = xs[:0], others[:0]
		return c.Ask(&e.Encoder, func(typ uint16, body []byte) {
			if typ != subsysExpect<<8|msgNew {
				return
			}
			switch x, ok := parseExpectation(body); {
			case !ok:
			case x.ours():
				xs = append(xs, x)
			default:
				others = append(others, x.foreign())
			}
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list expectations: %w", nfnl.Permitted(err))
	}
	for _, x := range others {
		foreign(x)
	}
	return xs, nil
}

// join returns xs with the zones and marks of their anchors, without expectations that lost
// their anchor meanwhile.
func join(c *nfnl.Conn, xs []expectation) ([]expectation, error) {
	marks, err := listAnchors(c)
	if err != nil {
		return nil, err
	}
	zones := make(map[anchor][]uint16, len(marks)) // by anchor without zone
	for a := range marks {
		zone := a.zone
		a.zone = 0
		zones[a] = append(zones[a], zone)
	}
	var e encoder
	var out []expectation
	seen := make(map[cone.Key]bool)
	for _, x := range xs {
		in := zones[x.anchor()]
		for _, zone := range in {
			x.zone = zone
			k := x.permission().Key
			if seen[k] {
				continue
			}
			seen[k] = true
			found := x
			if len(in) > 1 {
				// Several zones have such an anchor. Ask the kernel which of them has this
				// expectation.
				var ok bool
				if found, ok, err = get(c, &e, &k); err != nil {
					return nil, err
				}
				if !ok || !found.ours() {
					continue
				}
			}
			found.mark = marks[found.anchor()]
			out = append(out, found)
		}
	}
	return out, nil
}
