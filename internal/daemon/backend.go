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
	// Revoke ends ps. It is no error if some are gone already.
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

// backends are the backends in use. The model knows which permission stands in which.
type backends struct {
	expect *expect.Backend // nil where it is not used
	nft    *elements.Map   // nil where it is not used

	revoked *elements.Revoked // what the user revoked; nil without nftables

	// The batch under way, kept here to avoid allocations.
	part     []cone.Permission
	index    []int // for each of part, its index in the batch
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

// split selects the ops for a carrier: it puts their permissions into b.part and their
// indexes into b.index.
func (b *backends) split(ops []cone.Op, by cone.Carriers) {
	b.part, b.index = b.part[:0], b.index[:0]
	for i := range ops {
		if ops[i].By&by != 0 {
			b.part, b.index = append(b.part, ops[i].Permission), append(b.index, i)
		}
	}
}

// A failure is called for each op of a batch that a carrier refused: with its index, and why.
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

// NoteRevoked notes for the next daemon that the user revoked ps.
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

// forgetRevoked forgets that the user revoked the permissions of ops.
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
	_ = b.revoked.Drop(keys) // a key that could not be dropped stays known
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

// partNames are the identifiers of what is repaired (docs/control.md).
var partNames = [parts]string{
	anAnchor:      "anchors",
	anExpectation: "expectations",
	anElement:     "elements",
	tableSize:     "expect_max",
}

// partOf returns the part that a carrier makes for a permission.
func partOf(by cone.Carriers) part {
	if by == cone.ByMap {
		return anElement
	}
	return anExpectation
}

// Refresh renews the timeouts of ops. It calls lost with the index of each op that no
// longer stands, and the carrier by which it stood.
func (b *backends) Refresh(ops []cone.Op, lost func(i int, by cone.Carriers)) {
	b.each(func(by cone.Carriers, x backend) {
		b.split(ops, by)
		x.Refresh(b.part, func(i int) { lost(b.index[i], by) })
	})
}

// because returns err, or an error that says r if err is nil.
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

// found is what stands in the kernel, by backend. A backend that was not listed has a nil
// map.
type found struct {
	expect, nft map[cone.Key]standing
	foreign     []expect.Foreign
	asked       func(cone.Key) bool // if the nft map is not listed, the keys to ask for; nil: all
}

type standing struct {
	in   cone.Endpoint
	left time.Duration
}

// list lists the expectations that stand and, if ofMap is set, the elements of the map.
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

// missing returns the carriers by which v stands but whose lists lack it. Without a list of
// expectations none is missing. Without one of the map, each element selected by asked
// counts as missing, and backends.missing asks the kernel.
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

// settle removes v, which stands, from the lists that should have it.
func (f found) settle(v *cone.View) {
	if v.By&cone.ByExpectation != 0 {
		delete(f.expect, v.Key)
	}
	if v.By&cone.ByMap != 0 {
		delete(f.nft, v.Key)
	}
}

// missing calls lost for each op that f, a new list of the expectations, lacks if one was
// made, and for each op that the map does not hold, by the kernel's answer.
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
