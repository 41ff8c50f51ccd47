package daemon

import (
	"errors"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules"
)

// A backend makes permissions stand in the kernel: package expect, or the map of
// package rules. All methods but List are called by the loop alone.
type backend interface {
	// Carries reports whether p can stand by this backend.
	Carries(p *cone.Permission) bool
	// Grant makes ps stand, in order, and calls refused for each that does
	// not: its index, why, and the kernel's error if there was one.
	Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error))
	// Revoke ends ps. What is gone already is no error.
	Revoke(ps []cone.Permission) error
	// Refresh renews the kernel's timeouts of ps and calls lost for each that
	// does not stand any more.
	Refresh(ps []cone.Permission, lost func(i int))
	// List calls f for each permission that stands, with the time it has left.
	// It may run beside all other methods.
	List(f func(p cone.Permission, left time.Duration)) error
	// SetLifetime sets the timeout of what is granted or refreshed from now on.
	SetLifetime(d time.Duration)
	// Max is how many permissions may stand.
	Max() int
}

var (
	_ backend = (*expect.Backend)(nil)
	_ backend = (*rules.Map)(nil)
)

// backends are the ones in use. What one of them carries stands: with both, the
// map holds every permission that it can, for it has room and the kernel fills it
// at once; expectations stand for as many as their caps allow, for their children
// pass any firewall.
type backends struct {
	expect *expect.Backend       // nil where it is not used
	nft    *rules.Map            // nil where it is not used
	full   map[cone.Key]struct{} // what the map had no room for

	// The batch that is under way, kept here so that it costs no allocation.
	out      []outcome
	part     []cone.Permission
	index    []int // of part, in the batch
	onExpect func(i int, r cone.Reason, err error)
	onNFT    func(i int, r cone.Reason, err error)
}

// An outcome is what became of a grant.
type outcome struct {
	carried bool
	reason  cone.Reason
	err     error
}

func newBackends() *backends {
	b := &backends{full: make(map[cone.Key]struct{})}
	b.onExpect = func(i int, r cone.Reason, err error) {
		b.out[b.index[i]] = outcome{reason: r, err: err}
	}
	b.onNFT = func(i int, r cone.Reason, err error) {
		if o := &b.out[b.index[i]]; !o.carried {
			*o = outcome{reason: r, err: err}
		}
		b.full[b.part[i].Key] = struct{}{}
	}
	return b
}

// each calls f for each backend in use.
func (b *backends) each(f func(backend)) {
	if b.expect != nil {
		f(b.expect)
	}
	if b.nft != nil {
		f(b.nft)
	}
}

// String names the backends in use.
func (b *backends) String() string {
	switch {
	case b.nft == nil:
		return "expect"
	case b.expect == nil:
		return "nft"
	}
	return "expect and nft"
}

// carries names the backends that carry p, which stands.
func (b *backends) carries(p *cone.Permission) string {
	inMap := b.wantsMap(p)
	switch {
	case b.expect == nil || !b.expect.Stands(p):
		return "nft"
	case !inMap:
		return "expect"
	}
	return "expect and nft"
}

// wantsMap reports whether p, if it stands, stands in the map.
func (b *backends) wantsMap(p *cone.Permission) bool {
	_, full := b.full[p.Key]
	return b.nft != nil && b.nft.Carries(p) && !full
}

// split puts those of ps that f wants into b.part and b.index.
func (b *backends) split(ps []cone.Permission, f func(p *cone.Permission) bool) {
	b.part, b.index = b.part[:0], b.index[:0]
	for i := range ps {
		if f(&ps[i]) {
			b.part, b.index = append(b.part, ps[i]), append(b.index, i)
		}
	}
}

// Grant makes ps stand and calls refused for each that no backend carries.
func (b *backends) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	b.out = b.out[:0]
	for range ps {
		b.out = append(b.out, outcome{reason: cone.ReasonNoBackend})
	}
	if b.expect != nil {
		b.split(ps, b.expect.Carries)
		for _, i := range b.index {
			b.out[i].carried = true
		}
		b.expect.Grant(b.part, b.onExpect)
	}
	if b.nft != nil {
		b.split(ps, b.nft.Carries)
		for i := range b.part {
			delete(b.full, b.part[i].Key)
		}
		b.nft.Grant(b.part, b.onNFT)
		for i := range b.part {
			if _, full := b.full[b.part[i].Key]; !full {
				b.out[b.index[i]].carried = true
			}
		}
	}
	for i := range b.out {
		if o := &b.out[i]; !o.carried {
			refused(i, o.reason, o.err)
		}
	}
}

// Revoke ends ps.
func (b *backends) Revoke(ps []cone.Permission) error {
	var errs []error
	b.each(func(x backend) { errs = append(errs, x.Revoke(ps)) })
	for i := range ps {
		delete(b.full, ps[i].Key)
	}
	return errors.Join(errs...)
}

// Deny ends ps and keeps the kernel from learning them.
func (b *backends) Deny(ps []cone.Permission, why cone.Reason) error {
	if b.nft == nil {
		return nil
	}
	b.split(ps, b.nft.Carries)
	return b.nft.Deny(b.part, why)
}

// A part is something of ours in the kernel that somebody else can take away.
type part uint8

const (
	noPart part = iota
	anAnchor
	anExpectation
	anElement
	tableSize
	parts
)

var partNames = [parts]string{
	anAnchor:      "anchors",
	anExpectation: "expectations",
	anElement:     "elements of the map",
	tableSize:     expectMax,
}

// Refresh renews the timeouts of ps and calls lost with the index of each that
// is not whole any more, and what is missing.
func (b *backends) Refresh(ps []cone.Permission, lost func(i int, what part)) {
	if b.expect != nil {
		b.split(ps, b.expect.Stands)
		b.expect.Refresh(b.part, func(i int) { lost(b.index[i], anExpectation) })
	}
	if b.nft != nil {
		b.split(ps, b.wantsMap)
		b.nft.Refresh(b.part, func(i int) { lost(b.index[i], anElement) })
	}
	// One that was adopted from another mode is carried by none yet.
	for i := range ps {
		if !b.wantsMap(&ps[i]) && (b.expect == nil || !b.expect.Stands(&ps[i])) {
			lost(i, noPart)
		}
	}
}

// incomplete reports whether p, which stands, could stand as an expectation too.
func (b *backends) incomplete(p *cone.Permission) bool {
	return b.expect != nil && b.expect.HasRoom(p)
}

// Complete makes p, which is incomplete, stand as an expectation too.
func (b *backends) Complete(p cone.Permission) {
	b.part = append(b.part[:0], p)
	b.expect.Grant(b.part, func(int, cone.Reason, error) {})
}

// configure applies cfg to what is granted or refreshed from now on.
func (b *backends) configure(cfg config.Config) {
	b.each(func(x backend) { x.SetLifetime(cfg.Lifetime) })
	if b.nft != nil {
		b.nft.Configure(mapConfig(cfg))
	}
}

// Max is how many permissions may stand.
func (b *backends) Max() (n int) {
	b.each(func(x backend) { n = max(n, x.Max()) })
	return n
}

// found is what stands in the kernel, by backend; that of one that was not listed is
// nil.
type found struct{ expect, nft map[cone.Key]standing }

type standing struct {
	in   cone.Endpoint
	left time.Duration
}

// list lists what stands, as expectations and, if it is asked for, in the map.
func (b *backends) list(ofMap bool) (f found, err error) {
	into := func(m *map[cone.Key]standing) func(p cone.Permission, left time.Duration) {
		*m = make(map[cone.Key]standing)
		return func(p cone.Permission, left time.Duration) { (*m)[p.Key] = standing{p.Int, left} }
	}
	if b.expect != nil {
		err = b.expect.List(into(&f.expect))
	}
	if b.nft != nil && ofMap {
		err = errors.Join(err, b.nft.List(into(&f.nft)))
	}
	return f, err
}

// whole reports whether p, which should stand, is in the lists wherever it should.
func (b *backends) whole(p *cone.Permission, f found) bool {
	return b.expected(p, f) && (!b.wantsMap(p) || has(f.nft, p))
}

func (b *backends) expected(p *cone.Permission, f found) bool {
	return f.expect == nil || !b.expect.Stands(p) || has(f.expect, p)
}

func has(m map[cone.Key]standing, p *cone.Permission) bool {
	s, ok := m[p.Key]
	return ok && s.in == p.Int
}

// missing calls lost for each of ps that is not in a new list of the expectations,
// where one was needed, or of which the kernel says that the map does not hold it.
func (b *backends) missing(ps []cone.Permission, f found, lost func(cone.Permission, part)) {
	b.split(ps, func(p *cone.Permission) bool {
		if !b.expected(p, f) {
			lost(*p, anExpectation)
			return false
		}
		return b.wantsMap(p)
	})
	if len(b.part) > 0 {
		b.nft.Missing(b.part, func(i int) { lost(b.part[i], anElement) })
	}
}
