package expect

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

const (
	// batch is how many permissions go into one send: enough to share its
	// cost, few enough that a burst does not hold up the next event.
	batch = 64

	// anchorExtra is how much longer an anchor lives than its expectation,
	// which dies with it.
	anchorExtra = 60 * time.Second

	// maxPeersOnPort bounds the expectations of one outside endpoint. They
	// share one chain of the kernel's hash, and every unsolicited packet to
	// that port walks it under a lock that all namespaces share.
	maxPeersOnPort = 64
)

// Config tells Open what to do.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current.
	NetNS int
	// Lifetime is the timeout that an expectation gets, or a little less
	// until the first Refresh; it must be refreshed after half of it. If the
	// daemon dies, nothing stays open for longer.
	Lifetime time.Duration
	// IPv6 wants permissions for IPv6 too, and MayIPv6 does where the kernel has a helper
	// for them.
	IPv6, MayIPv6 bool
}

// A Backend makes permissions stand as expectations. Its methods must not be
// called concurrently, except List, which may run beside all others.
type Backend struct {
	cfg      Config
	c        *nfnl.Conn
	enc      encoder
	helpers  helpers
	standing ledger
	adopted  []Adopted
	names    []string    // of the helpers on anchors, sorted
	zoned    atomic.Bool // something stands, or stood, outside the default zone

	// The batch that is under way, kept here so that it costs no allocation.
	perms   []cone.Permission
	anchors [batch]anchor
	skip    [batch]bool // not sent
	errs    [batch]answers
	first   uint32
	failed  func(seq uint32, err error)
}

// answers are what the kernel said to the messages of one permission, nil for
// yes.
type answers [3]error

func (a answers) failed() bool { return a != answers{} }

// Open finds out by trying which helper the kernel offers for anchors, and
// returns a Backend that uses it and owns what an earlier daemon left. It
// leaves nothing in the kernel but, where the kernel has nfnetlink_cthelper,
// our own helper; see OwnHelper.
func Open(cfg Config) (*Backend, error) {
	c, err := nfnl.Dial(cfg.NetNS)
	if err != nil {
		return nil, err
	}
	b := newBackend(cfg, c)
	if b.helpers, err = chooseHelpers(c, cfg); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	b.names = []string{b.helpers.v4.name, b.helpers.v6.name}
	if err := b.adopt(); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	slices.Sort(b.names)
	b.names = slices.DeleteFunc(slices.Compact(b.names), func(name string) bool { return name == "" })
	return b, nil
}

func newBackend(cfg Config, c *nfnl.Conn) *Backend {
	b := &Backend{cfg: cfg, c: c, standing: newLedger(defaultMax)}
	b.failed = func(seq uint32, err error) {
		n := int(seq - b.first)
		b.errs[n/perPermission][n%perPermission] = err
	}
	return b
}

// adopt takes over what an earlier daemon left, so that it can be revoked,
// refreshed or granted again. Anchors whose expectations have run out since then end.
func (b *Backend) adopt() error {
	err := list(b.cfg.NetNS, true, func(x *expectation) {
		b.standing.take(x.anchor(), x.dst.Addr)
		b.adopted = append(b.adopted, Adopted{x.permission(), cone.ByExpectation, x.left()})
		b.see(x.zone)
		if name := unix.ByteSliceToString(x.helper[:]); !slices.Contains(b.names, name) {
			b.names = append(b.names, name)
		}
	})
	if err != nil {
		return err
	}
	_, err = b.dropAnchors()
	return err
}

// An Adopted permission stood when the Backend was opened, and would have ended
// after Left without a daemon.
type Adopted struct {
	cone.Permission
	By   cone.Carriers
	Left time.Duration
}

// Left returns what an earlier daemon left in the network namespace behind a
// descriptor, 0 for the current.
func Left(netns int) (found []Adopted, err error) {
	err = list(netns, true, func(x *expectation) {
		found = append(found, Adopted{x.permission(), cone.ByExpectation, x.left()})
	})
	return found, err
}

// Adopted returns what an earlier daemon left, at the first call.
func (b *Backend) Adopted() []Adopted {
	found := b.adopted
	b.adopted = nil
	return found
}

func (b *Backend) see(zone uint16) {
	if zone != 0 && !b.zoned.Load() {
		b.zoned.Store(true)
	}
}

// defaultMax is Max until SetMax: it leaves a part of the kernel's least expectation
// table to others.
const defaultMax = 768

// SetMax says how many permissions the backend will let stand. More that do already
// stay.
func (b *Backend) SetMax(n int) { b.standing.max = n }

// SetLifetime sets Config.Lifetime for what is granted or refreshed from now on.
func (b *Backend) SetLifetime(d time.Duration) { b.cfg.Lifetime = d }

// Max returns how many permissions the backend will let stand.
func (b *Backend) Max() int { return b.standing.max }

// Helpers returns the names of the helpers in use for IPv4 and IPv6.
func (b *Backend) Helpers() (ipv4, ipv6 string) { return b.helpers.v4.name, b.helpers.v6.name }

// OnAnchors returns the names of all helpers that an anchor may have: those in use, and
// those that an earlier daemon used.
func (b *Backend) OnAnchors() []string { return b.names }

// Standing returns how many permissions the backend made or adopted, and has
// not revoked.
func (b *Backend) Standing() int { return len(b.standing.ext) }

// Stands reports whether the backend made or adopted p, and has not revoked it.
func (b *Backend) Stands(p *cone.Permission) bool {
	_, stands, _ := b.standing.of(p)
	return stands
}

// Carries reports whether p can stand as an expectation. One that translates is
// for one peer: nat-follow-master makes the peer of its master the source of all
// children.
func (*Backend) Carries(p *cone.Permission) bool { return p.Wild == 0 || p.Routed() }

// Anchored returns the key of the permission that stands by an anchor with this
// original direction, but for Wild, and whether there is one.
func (b *Backend) Anchored(src, dst cone.Endpoint, zone uint16) (k cone.Key, ok bool) {
	a := anchorAt(src, dst, zone)
	ext, ok := b.standing.ext[a]
	return cone.Key{Ext: cone.Endpoint{Addr: ext, Port: a.port}, Peer: a.peer, Zone: zone}, ok
}

// HasRoom reports whether the caps let p, which does not stand, stand.
func (b *Backend) HasRoom(p *cone.Permission) bool {
	_, stands, r := b.standing.place(p)
	return b.Carries(p) && !stands && r == cone.ReasonNone && b.helpers.of(p).name != ""
}

// Close closes the connection. It revokes nothing. It removes our own helper
// unless something stands: the kernel ends the expectations of a helper that
// goes.
func (b *Backend) Close() error {
	var err error
	if b.Standing() == 0 {
		err = b.helpers.unregister(b.c)
	}
	return errors.Join(err, b.c.Close())
}

func seconds(d time.Duration) uint32 { return uint32((d + time.Second - 1) / time.Second) }

func (b *Backend) timeouts() (anchor, expectation uint32) {
	return seconds(b.cfg.Lifetime + anchorExtra), seconds(b.cfg.Lifetime)
}

// Grant makes ps stand, in order. For each that does not stand afterwards it
// calls refused with its index, the reason and the kernel's error, if any. One
// that stands already is renewed.
func (b *Backend) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	for base := 0; base < len(ps); base += batch {
		b.grant(base, ps[base:min(base+batch, len(ps))], refused)
	}
}

func (b *Backend) grant(base int, ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	anchorTime, _ := b.timeouts()
	b.begin(ps)
	for i := range ps {
		p := &ps[i]
		if b.skip[i] = b.helpers.of(p).name == ""; b.skip[i] {
			refused(base+i, cone.ReasonKernel, ErrNoHelper)
			continue
		}
		b.see(p.Zone)
		a, reason := b.standing.reserve(p)
		if b.skip[i] = reason != cone.ReasonNone; b.skip[i] {
			refused(base+i, reason, nil)
			continue
		}
		b.anchors[i] = a
		b.enc.newAnchor(b.seq(i), p, a, b.helpers.of(p).name, anchorTime)
		b.enc.newExpect(b.seq(i)+1, p, a)
	}
	err := b.c.Exchange(&b.enc.Encoder, b.failed, nil)
	if err == nil {
		err = b.setTimeouts()
	}
	broken := false
	for i := range ps {
		switch {
		case b.skip[i]:
		case err != nil:
			// What the kernel did is not known.
			refused(base+i, cone.ReasonKernel, err)
			if !broken {
				broken = b.withdraw(&ps[i], b.anchors[i]) != nil
			}
		case b.errs[i].failed():
			if reason, err := b.mend(&ps[i], b.anchors[i], b.errs[i]); reason != cone.ReasonNone {
				refused(base+i, reason, err)
			}
		}
	}
}

// setTimeouts gives the new expectations of the batch their timeout, unless
// that of their helper suits. It is a send of its own: where the kernel refused
// the expectation because somebody else's is in the way, the message would
// change that one.
func (b *Backend) setTimeouts() error {
	_, timeout := b.timeouts()
	b.enc.Reset()
	for i := range b.perms {
		p := &b.perms[i]
		if !b.skip[i] && !b.errs[i].failed() && !b.helpers.of(p).suits(timeout) {
			b.enc.renewExpect(b.seq(i)+2, p, b.anchors[i], timeout)
		}
	}
	return b.c.Exchange(&b.enc.Encoder, b.failed, nil)
}

// perPermission is how many messages a permission has in a batch at most.
const perPermission = len(answers{})

// begin starts a batch for ps.
func (b *Backend) begin(ps []cone.Permission) {
	b.enc.Reset()
	b.perms = ps
	b.first = b.c.NextSeq(perPermission * len(ps))
	clear(b.errs[:len(ps)])
}

// seq returns the sequence number of the first message of permission i.
func (b *Backend) seq(i int) uint32 { return b.first + uint32(perPermission*i) }

// Revoke ends ps. What is gone already is no error; other errors are joined,
// and what they are about still counts as standing. Nothing is sent for a
// permission that the backend neither made nor adopted. The kernel deletes by
// tuple: if the expectation vanished unnoticed and somebody else made one like
// it since, that one goes.
func (b *Backend) Revoke(ps []cone.Permission) error {
	var errs []error
	for base := 0; base < len(ps); base += batch {
		if err := b.revoke(ps[base:min(base+batch, len(ps))]); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func (b *Backend) revoke(ps []cone.Permission) error {
	b.begin(ps)
	for i := range ps {
		a, stands, _ := b.standing.of(&ps[i])
		if b.skip[i] = !stands; stands {
			b.anchors[i] = a
			b.enc.deleteExpect(b.seq(i), &ps[i].Key)
			b.enc.deleteAnchor(b.seq(i)+1, a)
		}
	}
	if err := b.c.Exchange(&b.enc.Encoder, b.failed, nil); err != nil {
		return fmt.Errorf("revoke permissions: %w", err)
	}
	var errs []error
	for i := range ps {
		if b.skip[i] {
			continue
		}
		if err := b.errs[i].deleted(); err != nil {
			errs = append(errs, fmt.Errorf("revoke %v -> %v: %w", ps[i].Peer, ps[i].Ext, err))
			continue
		}
		b.standing.release(b.anchors[i])
	}
	return errors.Join(errs...)
}

// deleted returns the first error but for those that say that it is gone.
func (a answers) deleted() error {
	for _, err := range a {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// Refresh renews the timeouts of ps and calls lost with the index of each that
// is not whole in the kernel any more.
func (b *Backend) Refresh(ps []cone.Permission, lost func(i int)) {
	for base := 0; base < len(ps); base += batch {
		b.refresh(base, ps[base:min(base+batch, len(ps))], lost)
	}
}

func (b *Backend) refresh(base int, ps []cone.Permission, lost func(i int)) {
	anchorTime, expectTime := b.timeouts()
	b.begin(ps)
	for i := range ps {
		a, stands, _ := b.standing.of(&ps[i])
		if b.skip[i] = !stands; stands {
			b.enc.renewAnchor(b.seq(i), &ps[i], a, b.helpers.of(&ps[i]).name, anchorTime) // never to expire under its expectation
			b.enc.renewExpect(b.seq(i)+1, &ps[i], a, expectTime)
		}
	}
	err := b.c.Exchange(&b.enc.Encoder, b.failed, nil)
	for i := range ps {
		if err != nil || b.skip[i] || b.errs[i].failed() {
			lost(base + i)
		}
	}
}
