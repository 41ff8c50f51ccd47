package daemon

import (
	"errors"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules/elements"
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
	_ backend = (*elements.Map)(nil)
)

// backends are the ones in use. What stands where, the model says.
type backends struct {
	expect *expect.Backend // nil where it is not used
	nft    *elements.Map   // nil where it is not used

	revoked *elements.Revoked // by the user; nil without nftables

	// The batch that is under way, kept here so that it costs no allocation.
	part     []cone.Permission
	index    []int // of part, in the batch
	by       cone.Carriers
	failed   failure
	onFailed func(i int, r cone.Reason, err error)
}

func newBackends() *backends {
	b := &backends{}
	b.onFailed = func(i int, r cone.Reason, err error) { b.failed(b.index[i], b.by, r, err) }
	return b
}

// each calls f for each backend in use.
func (b *backends) each(f func(cone.Carriers, backend)) {
	if b.expect != nil {
		f(cone.ByExpectation, b.expect)
	}
	if b.nft != nil {
		f(cone.ByMap, b.nft)
	}
}

// carriers are the backends in use.
func (b *backends) carriers() (by cone.Carriers) {
	b.each(func(c cone.Carriers, _ backend) { by |= c })
	return by
}

// String names the backends in use.
func (b *backends) String() string { return b.carriers().String() }

// split puts the permissions of those of ops that are by some carrier into b.part and
// b.index.
func (b *backends) split(ops []cone.Op, by cone.Carriers) {
	b.part, b.index = b.part[:0], b.index[:0]
	for i := range ops {
		if ops[i].By&by != 0 {
			b.part, b.index = append(b.part, ops[i].Permission), append(b.index, i)
		}
	}
}

// A failure is what a carrier did not do of a batch: the index, and why.
type failure func(i int, by cone.Carriers, r cone.Reason, err error)

// Grant makes the permissions of ops stand and calls failed for each carrier that
// refuses one.
func (b *backends) Grant(ops []cone.Op, failed failure) {
	b.failed = failed
	b.forgetRevoked(ops)
	if b.expect != nil {
		b.split(ops, cone.ByExpectation)
		b.by = cone.ByExpectation
		b.expect.Grant(b.part, b.onFailed)
	}
	if b.nft != nil {
		b.split(ops, cone.ByMap)
		b.by = cone.ByMap
		b.nft.Grant(b.part, b.onFailed)
	}
}

// Revoke ends the permissions of ops.
func (b *backends) Revoke(ops []cone.Op) error {
	var errs []error
	b.each(func(by cone.Carriers, x backend) {
		b.split(ops, by)
		errs = append(errs, x.Revoke(b.part))
	})
	return errors.Join(errs...)
}

// Deny ends ps and keeps the kernel from learning them.
func (b *backends) Deny(ps []cone.Permission, why cone.Reason) error {
	if b.nft == nil {
		return nil
	}
	b.part = b.part[:0]
	for i := range ps {
		if b.nft.Carries(&ps[i]) {
			b.part = append(b.part, ps[i])
		}
	}
	return b.nft.Deny(b.part, why)
}

// NoteRevoked notes for the next daemon that the user took ps away.
func (b *backends) NoteRevoked(ps []cone.Permission) error {
	if b.revoked == nil {
		return nil
	}
	keys := make([]cone.Key, len(ps))
	for i := range ps {
		keys[i] = ps[i].Key
	}
	return b.revoked.Add(keys)
}

// forgetRevoked forgets that the user took the permissions of ops away.
func (b *backends) forgetRevoked(ops []cone.Op) {
	if b.revoked == nil {
		return
	}
	var keys []cone.Key
	for i := range ops {
		if b.revoked.Has(ops[i].Key) {
			keys = append(keys, ops[i].Key)
		}
	}
	_ = b.revoked.Drop(keys) // what is not dropped is known still
}

// A part is something of ours in the kernel that somebody else can take away.
type part uint8

const (
	anAnchor part = iota
	anExpectation
	anElement
	tableSize
	parts
)

// partNames are the identifiers of what is put back (docs/control.md).
var partNames = [parts]string{
	anAnchor:      "anchors",
	anExpectation: "expectations",
	anElement:     "elements",
	tableSize:     "expect_max",
}

// partOf is what stands by a carrier.
func partOf(by cone.Carriers) part {
	if by == cone.ByMap {
		return anElement
	}
	return anExpectation
}

// Refresh renews the timeouts of ops and calls lost with the index of each that does
// not stand any more, and by what it did.
func (b *backends) Refresh(ops []cone.Op, lost func(i int, by cone.Carriers)) {
	b.each(func(by cone.Carriers, x backend) {
		b.split(ops, by)
		x.Refresh(b.part, func(i int) { lost(b.index[i], by) })
	})
}

// because returns err, or without one an error that says r.
func because(r cone.Reason, err error) error {
	if err == nil {
		err = errors.New(r.String())
	}
	return err
}

// configure applies cfg to what is granted or refreshed from now on.
func (b *backends) configure(cfg config.Config) {
	b.each(func(_ cone.Carriers, x backend) { x.SetLifetime(cfg.Lifetime) })
	if b.nft != nil {
		b.nft.SetPeerGroups(cfg.PeerGroups)
	}
}

// Max is how many permissions may stand.
func (b *backends) Max() (n int) {
	b.each(func(_ cone.Carriers, x backend) { n = max(n, x.Max()) })
	return n
}

// found is what stands in the kernel, by backend; that of one that was not listed is
// nil.
type found struct {
	expect, nft map[cone.Key]standing
	foreign     []expect.Foreign
	asked       func(cone.Key) bool // of a map that is not listed, those to ask for; nil: all
}

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
		err = b.expect.ListAll(into(&f.expect), func(x expect.Foreign) { f.foreign = append(f.foreign, x) })
	}
	if b.nft != nil && ofMap {
		err = errors.Join(err, b.nft.List(into(&f.nft)))
	}
	return f, err
}

// missing returns by what v, which stands, should be listed and is not. A list that was
// not made misses nothing, but for the map: there it is asked for.
func (f found) missing(v *cone.View) (by cone.Carriers) {
	if v.By&cone.ByExpectation != 0 && f.expect != nil && !has(f.expect, v) {
		by |= cone.ByExpectation
	}
	if v.By&cone.ByMap != 0 && !has(f.nft, v) && (f.asked == nil || f.asked(v.Key)) {
		by |= cone.ByMap
	}
	return by
}

func has(m map[cone.Key]standing, v *cone.View) bool {
	s, ok := m[v.Key]
	return ok && s.in == v.Int
}

// settle takes v, which stands, out of the lists, wherever it should.
func (f found) settle(v *cone.View) {
	if v.By&cone.ByExpectation != 0 {
		delete(f.expect, v.Key)
	}
	if v.By&cone.ByMap != 0 {
		delete(f.nft, v.Key)
	}
}

// missing calls lost for each of ops that is not in a new list of the expectations,
// where one was needed, or of which the kernel says that the map does not hold it.
func (b *backends) missing(ops []cone.Op, f found, lost func(cone.Permission, cone.Carriers)) error {
	for i := range ops {
		if p := &ops[i].Permission; ops[i].By&cone.ByExpectation != 0 && f.expect != nil && f.expect[p.Key].in != p.Int {
			lost(*p, cone.ByExpectation)
		}
	}
	if b.split(ops, cone.ByMap); b.nft != nil && len(b.part) > 0 {
		return b.nft.Missing(b.part, func(i int) { lost(b.part[i], cone.ByMap) })
	}
	return nil
}
