package expect

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Cleaned counts what Cleanup removed from the kernel.
type Cleaned struct{ Expectations, Anchors int }

// Cleanup removes every expectation and anchor of a dead daemon, and our helper, from the
// kernel. No daemon may be running.
func Cleanup(netns int) (Cleaned, error) {
	var n Cleaned
	var errs []error
	var keys []cone.Key
	err := list(netns, true, func(x *expectation) { keys = append(keys, x.permission().Key) })
	if err != nil {
		return n, err
	}
	c, err := nfnl.Dial(netns)
	if err != nil {
		return n, err
	}
	defer func() { _ = c.Close() }()
	b := newBackend(Config{NetNS: netns}, c)
	for i := range keys {
		err := b.exchange(func(seq uint32) { b.enc.deleteExpect(seq, &keys[i]) })[0]
		if err == nil {
			n.Expectations++
		} else if !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete expectation: %w", err))
		}
	}
	if n.Anchors, err = b.dropAnchors(); err != nil {
		return n, errors.Join(append(errs, err)...)
	}
	name, err := OwnName(netns)
	if err == nil {
		err = unregisterOwn(c, name)
	}
	return n, errors.Join(append(errs, err)...)
}

// dropAnchors deletes the anchors without an expectation, and returns their number.
func (b *Backend) dropAnchors() (n int, err error) {
	found, err := listAnchors(b.c)
	errs := []error{err}
	for a := range found {
		if _, stands := b.standing.ext[a]; stands {
			continue
		}
		err := b.exchange(func(seq uint32) { b.enc.deleteAnchor(seq, a) })[0]
		if err == nil {
			n++
		} else if !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete anchor: %w", err))
		}
	}
	return n, errors.Join(errs...)
}

// listAnchors returns all anchors in the conntrack table, with their marks: UDP entries
// that have one port 0 and a helper, and are never dropped early.
func listAnchors(c *nfnl.Conn) (map[anchor]uint32, error) {
	found := make(map[anchor]uint32)
	err := nfnl.Uninterrupted(func() error {
		var e encoder
		e.Message(subsysConntrack, msgGet, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), unix.AF_UNSPEC)
		e.End()
		return c.Ask(&e.Encoder, func(typ uint16, body []byte) {
			if typ != subsysConntrack<<8|msgNew {
				return
			}
			if a, mark, ok := parseAnchor(body); ok {
				found[a] = mark
			}
		})
	})
	if err != nil {
		return nil, fmt.Errorf("list conntrack entries: %w", err)
	}
	return found, nil
}

// parseAnchor decodes a conntrack entry, without the netlink header, if it is an anchor.
func parseAnchor(b []byte) (a anchor, mark uint32, ok bool) {
	if len(b) < nfnl.FamilyHeaderLen {
		return a, 0, false
	}
	family := b[0]
	var orig nfnl.Tuple
	var helper bool
	var status uint32
	var zone uint16
	ok = nfnl.EachAttribute(b[nfnl.FamilyHeaderLen:], func(typ uint16, v []byte) bool {
		ok := true
		switch typ {
		case nfnl.CTATupleOrig:
			ok = orig.Parse(v, family)
		case nfnl.CTAStatus:
			status, ok = nfnl.BE32(v)
		case nfnl.CTAHelp:
			helper = true
		case nfnl.CTAMark:
			mark, ok = nfnl.BE32(v)
		case nfnl.CTAZone:
			zone, ok = nfnl.BE16(v)
		}
		return ok
	})
	ok = ok && orig.Proto == unix.IPPROTO_UDP && helper && cone.Status(status).Has(anchorStatus) && cone.IsAnchor(orig.Src, orig.Dst)
	return anchorAt(orig.Src, orig.Dst, zone), mark, ok
}
