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
	// batch is how many permissions go into one send: enough to share its cost, few enough
	// that a burst does not delay the next event.
	batch = 64

	// anchorExtra is how much longer an anchor lives than its expectation: an expectation
	// dies with its anchor.
	anchorExtra = 60 * time.Second

	// maxPeersOnPort bounds the expectations of one outside endpoint. They share one chain
	// of the kernel's hash table, and every unsolicited packet to that port walks the chain
	// under a lock that all namespaces share.
	maxPeersOnPort = 64
)

// Config tells Open what to do.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current.
	NetNS int
	// Lifetime is the timeout of an expectation; until its first renewal the timeout may be
	// a little less. Renew must be called after half of it. If the daemon dies, nothing
	// stays open for longer.
	Lifetime time.Duration
	// IPv6 requests permissions for IPv6 too. MayIPv6 requests them only if the kernel has
	// a helper for them.
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
	zoned    atomic.Bool // something stands or has stood outside the default zone

	// The batch in progress, kept here so that it costs no allocation.
	perms   []cone.Permission
	anchors [batch]anchor
	skip    [batch]bool // not sent
	errs    [batch]answers
	first   uint32
	failed  func(seq uint32, err error)
}

// answers are the kernel's answers to the messages of one permission, nil for success.
type answers [3]error

func (a answers) failed() bool { return a != answers{} }

// Open tries which helper the kernel offers for anchors, and returns a Backend that uses it
// and owns what an earlier daemon left. It leaves nothing in the kernel except our own
// helper (nfnl.OwnHelper), if the kernel has nfnetlink_cthelper.
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

// adopt takes over what an earlier daemon left, so that it can be revoked, renewed or
// granted again. It deletes anchors whose expectations have expired since.
func (b *Backend) adopt() error {
	err := list(b.cfg.NetNS, true, func(x *expectation) {
		p := x.permission()
		b.standing.take(x.anchor(), &p)
		b.adopted = append(b.adopted, Adopted{p, cone.ByExpectation, x.left()})
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

// An Adopted permission stood when the Backend was opened. Without a daemon it would have
// ended after Left.
type Adopted struct {
	cone.Permission
	By   cone.Carriers
	Left time.Duration
}

// Left returns what an earlier daemon left in the network namespace behind the descriptor
// netns, 0 for the current.
func Left(netns int) (found []Adopted, err error) {
	err = list(netns, true, func(x *expectation) {
		found = append(found, Adopted{x.permission(), cone.ByExpectation, x.left()})
	})
	return found, err
}

// Adopted returns what an earlier daemon left. Further calls return nothing.
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

// defaultMax is Max until SetMax. It leaves part of the kernel's smallest expectation table
// to others.
const defaultMax = 768

// SetMax sets how many permissions may stand. If more stand already, they stay.
func (b *Backend) SetMax(n int) { b.standing.max = n }

// SetLifetime sets Config.Lifetime for permissions that are granted or renewed from now
// on.
func (b *Backend) SetLifetime(d time.Duration) { b.cfg.Lifetime = d }

// Max returns how many permissions may stand.
func (b *Backend) Max() int { return b.standing.max }

// Helpers returns the names of the helpers in use for IPv4 and IPv6.
func (b *Backend) Helpers() (ipv4, ipv6 string) { return b.helpers.v4.name, b.helpers.v6.name }

// OnAnchors returns the names of all helpers that an anchor may have: those in use, and
// those that an earlier daemon used.
func (b *Backend) OnAnchors() []string { return b.names }

// Standing returns how many permissions the backend has made or adopted, and not revoked.
func (b *Backend) Standing() int { return len(b.standing.ext) }

// Stands reports whether the backend has made or adopted p, and not revoked it.
func (b *Backend) Stands(p *cone.Permission) bool {
	_, stands, _ := b.standing.of(p)
	return stands
}

// Carries reports whether p can stand as an expectation.
func (*Backend) Carries(p *cone.Permission) bool { return p.Expectable() }

// Anchored returns the Key, without HostBits, of the permission whose anchor has this original
// direction, and whether there is one.
func (b *Backend) Anchored(src, dst cone.Endpoint, zone uint16) (k cone.Key, ok bool) {
	a := anchorAt(src, dst, zone)
	ext, ok := b.standing.ext[a]
	return cone.Key{Ext: cone.Endpoint{Addr: ext, Port: a.port}, Peer: a.peer, Zone: zone}, ok
}

// HasRoom reports whether p, which does not stand yet, may stand: the limits allow it, and
// it has a helper.
func (b *Backend) HasRoom(p *cone.Permission) bool {
	_, stands, r := b.standing.place(p)
	return b.Carries(p) && !stands && r == cone.ReasonNone && b.helpers.of(p).name != ""
}

// Close closes the connection. It revokes nothing. It removes our own helper unless
// something stands: when a helper goes, the kernel ends its expectations.
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

// Grant makes ps stand, in order. A permission that stands already is renewed. For each
// that does not stand afterwards Grant calls refused with its index, the reason and the
// kernel's error, if any.
func (b *Backend) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	b.retry()
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
			// It is unknown what the kernel did.
			refused(base+i, cone.ReasonKernel, err)
			if broken {
				b.standing.unwanted[b.anchors[i]] = ps[i]
			} else {
				broken = b.withdraw(&ps[i], b.anchors[i]) != nil
			}
		case b.errs[i].failed():
			if reason, err := b.repair(&ps[i], b.anchors[i], b.errs[i]); reason != cone.ReasonNone {
				refused(base+i, reason, err)
			}
		}
	}
}

// setTimeouts gives the new expectations of the batch their timeout, unless their helper's
// own suits. It is a separate send: if the kernel refused an expectation because another
// program's is in the way, the message would change that one.
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

// perPermission is the largest number of messages that a permission has in a batch.
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

// Revoke ends ps. A permission that is gone already is no error. Other errors are joined,
// and their permissions still count as standing; the next operation tries again. Nothing is
// sent for a permission that the backend neither made nor adopted. The kernel deletes by tuple:
// if an expectation vanished unnoticed and another program has made one like it since, that one
// is deleted.
func (b *Backend) Revoke(ps []cone.Permission) error {
	b.retry()
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
	var errs []error
	err := b.c.Exchange(&b.enc.Encoder, b.failed, nil)
	if err != nil {
		errs = append(errs, fmt.Errorf("revoke permissions: %w", err))
	}
	for i := range ps {
		if b.skip[i] {
			continue
		}
		failed := b.errs[i].deleted()
		if failed != nil {
			errs = append(errs, fmt.Errorf("revoke %v -> %v: %w", ps[i].Peer, ps[i].Ext, failed))
		}
		if err != nil || failed != nil {
			b.standing.unwanted[b.anchors[i]] = ps[i]
		} else {
			b.standing.release(b.anchors[i])
		}
	}
	return errors.Join(errs...)
}

// deleted returns the first error other than that the entry is gone.
func (a answers) deleted() error {
	for _, err := range a {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	}
	return nil
}

// Renew renews the timeouts of ps and calls lost with the index of each permission that
// is no longer complete in the kernel.
func (b *Backend) Renew(ps []cone.Permission, lost func(i int)) {
	b.retry()
	for base := 0; base < len(ps); base += batch {
		b.renewBatch(base, ps[base:min(base+batch, len(ps))], lost)
	}
}

func (b *Backend) renewBatch(base int, ps []cone.Permission, lost func(i int)) {
	anchorTime, expectTime := b.timeouts()
	b.begin(ps)
	for i := range ps {
		a, stands, _ := b.standing.of(&ps[i])
		if b.skip[i] = !stands; stands {
			b.enc.renewAnchor(b.seq(i), &ps[i], a, b.helpers.of(&ps[i]).name, anchorTime) // it must outlive its expectation
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
