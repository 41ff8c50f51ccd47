package engine

import (
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Kernel is what the engine uses of the kernel.
type Kernel struct {
	Expectations Expectations // nil if they are not in use
	Map          Map          // nil if it is not in use
	Revoked      Revoked      // nil without nftables
	Flows        Flows
	Sockets      Sockets
}

// A Carrier holds permissions in the kernel. Only the loop may call its methods, one at a
// time; those that list permissions may run beside all others.
type Carrier interface {
	// Carries reports whether it can hold p.
	Carries(p *cone.Permission) bool
	// Grant makes ps stand, in order, and calls refused for each that does not: its index,
	// why, and the kernel's error if there was one. If a permission stands already, Grant
	// renews it.
	Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error))
	// Revoke ends ps. It is no error if some have ended already.
	Revoke(ps []cone.Permission) error
	// Renew renews the kernel's timeouts of ps and calls lost for each that no longer
	// stands.
	Renew(ps []cone.Permission, lost func(i int))
	// SetLifetime sets the timeout of permissions that are granted or renewed from now on.
	SetLifetime(d time.Duration)
	// Max is how many permissions may stand.
	Max() int
}

// Expectations holds permissions as conntrack expectations (package expect).
type Expectations interface {
	Carrier
	// ListAll calls f for each permission that stands, with the time it has left, and
	// foreign for each expectation of somebody else. A list that is made while permissions
	// are renewed or end may lack some that stand.
	ListAll(f func(p cone.Permission, left time.Duration), foreign func(cone.Foreign)) error
	// HasRoom reports whether p, which does not stand by an expectation, could.
	HasRoom(p *cone.Permission) bool
	// Anchored returns the Key, without HostBits, of the permission whose anchor has this
	// original direction, and whether there is one.
	Anchored(src, dst cone.Endpoint, zone uint16) (cone.Key, bool)
}

// Map holds permissions as elements of the map of an nftables rule (package
// rules/elements). An element is known by its Key alone: a grant replaces an element that
// leads to another inside endpoint, and a revocation ends it.
type Map interface {
	Carrier
	// List calls f for each permission that stands, with the time it has left. A list that
	// is made while permissions are renewed may lack some that stand.
	List(f func(p cone.Permission, left time.Duration)) error
	// Missing looks up each of ps and calls missing for those that do not stand. If it
	// returns an error, some were not looked up.
	Missing(ps []cone.Permission, missing func(i int)) error
	// Deny ends ps and keeps the kernel from learning them, until a grant.
	Deny(ps []cone.Permission, why cone.Reason) error
}

// Revoked is where the next daemon finds what the user revoked.
type Revoked interface {
	Add(ks []cone.Key) error
	Has(k cone.Key) bool
	Drop(ks []cone.Key) error
}

// Flows looks up and deletes entries of the conntrack table. The endpoints and the zone are
// those of the original direction.
type Flows interface {
	Get(src, dst cone.Endpoint, zone uint16) (f cone.Flow, found bool, err error)
	Delete(src, dst cone.Endpoint, zone uint16, id uint32) (deleted bool, err error)
}

// Sockets looks up local sockets.
type Sockets interface {
	// Serves reports whether a socket gets what peer sends to ext, from some port.
	Serves(ext cone.Endpoint, peer cone.Addr) (bool, error)
	// Takes reports whether a socket other than that at in gets what peer sends to ext.
	Takes(ext, in cone.Endpoint, peer cone.Addr) (bool, error)
}

// Ports are the local sockets at one time. Connected sockets do not count as serving.
type Ports interface {
	Serves(ext cone.Endpoint) bool
	Takes(ext, in cone.Endpoint) bool
	// Connected returns the endpoints of connected sockets with their peers.
	Connected() map[cone.Key]struct{}
}

// Each calls f for each carrier in use.
func (k Kernel) Each(f func(cone.Carriers, Carrier)) {
	if k.Expectations != nil {
		f(cone.ByExpectation, k.Expectations)
	}
	if k.Map != nil {
		f(cone.ByMap, k.Map)
	}
}

// Carriers are the carriers in use.
func (k Kernel) Carriers() (by cone.Carriers) {
	k.Each(func(c cone.Carriers, _ Carrier) { by |= c })
	return by
}

// Max is how many permissions may stand.
func (k Kernel) Max() (n int) {
	k.Each(func(_ cone.Carriers, c Carrier) { n = max(n, c.Max()) })
	return n
}

// SetLifetime sets the timeout of permissions that are granted or renewed from now on.
func (k Kernel) SetLifetime(d time.Duration) {
	k.Each(func(_ cone.Carriers, c Carrier) { c.SetLifetime(d) })
}

// batch is the part of some ops that is for one carrier. It is kept to avoid allocations.
type batch struct {
	perms []cone.Permission
	index []int // for each of perms, its index among the ops
}

// take fills the batch with the part of ops that is for a carrier.
func (b *batch) take(ops []cone.Op, by cone.Carriers) {
	b.perms, b.index = b.perms[:0], b.index[:0]
	for i := range ops {
		if ops[i].By&by != 0 {
			b.perms, b.index = append(b.perms, ops[i].Permission), append(b.index, i)
		}
	}
}

// grantOps makes the permissions of ops stand. Engine.failed is told of each carrier that
// refuses one.
func (e *Engine) grantOps(ops []cone.Op) {
	e.forgetRevoked(ops)
	if x := e.Kernel.Expectations; x != nil {
		e.batch.take(ops, cone.ByExpectation)
		e.by = cone.ByExpectation
		x.Grant(e.batch.perms, e.onFailed)
	}
	e.finish()
	if x := e.Kernel.Map; x != nil {
		e.batch.take(ops, cone.ByMap)
		e.by = cone.ByMap
		x.Grant(e.batch.perms, e.onFailed)
	}
}

// revoke ends the permissions of ops as far as one carrier holds them.
func (e *Engine) revoke(ops []cone.Op, only cone.Carriers) {
	e.Kernel.Each(func(by cone.Carriers, c Carrier) {
		if e.batch.take(ops, by&only); len(e.batch.perms) > 0 {
			e.cfg.Failed(RevokePermissions, len(e.batch.perms), c.Revoke(e.batch.perms))
		}
	})
}

// renew renews the timeouts of ops and grants again what no longer stands.
func (e *Engine) renew(ops []cone.Op) {
	e.Kernel.Each(func(by cone.Carriers, c Carrier) {
		e.batch.take(ops, by)
		e.by = by
		c.Renew(e.batch.perms, e.onLost)
	})
}

// denyInMap ends ps and keeps the kernel from learning them.
func (e *Engine) denyInMap(ps []cone.Permission, why cone.Reason) error {
	m := e.Kernel.Map
	if m == nil {
		return nil
	}
	e.batch.perms = e.batch.perms[:0]
	for i := range ps {
		if m.Carries(&ps[i]) {
			e.batch.perms = append(e.batch.perms, ps[i])
		}
	}
	return m.Deny(e.batch.perms, why)
}

// noteRevoked notes for the next daemon that the user revoked ps.
func (e *Engine) noteRevoked(ps []cone.Permission) error {
	if e.Kernel.Revoked == nil {
		return nil
	}
	keys := make([]cone.Key, len(ps))
	for i := range ps {
		keys[i] = ps[i].Key
	}
	return e.Kernel.Revoked.Add(keys)
}

// forgetRevoked forgets that the user revoked the permissions of ops.
func (e *Engine) forgetRevoked(ops []cone.Op) {
	if e.Kernel.Revoked == nil {
		return
	}
	var keys []cone.Key
	for i := range ops {
		if e.Kernel.Revoked.Has(ops[i].Key) {
			keys = append(keys, ops[i].Key)
		}
	}
	_ = e.Kernel.Revoked.Drop(keys) // a key that could not be dropped stays known
}
