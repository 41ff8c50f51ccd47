package expect

import (
	"errors"
	"fmt"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"golang.org/x/sys/unix"
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

	// share of the kernel's table, in percent, that may be ours.
	tableShare = 75
)

// Config tells Open what to do.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current.
	NetNS int
	// Lifetime is the timeout that an expectation gets; it must be refreshed
	// before. If the daemon dies, nothing stays open for longer.
	Lifetime time.Duration
	// IPv6 wants permissions for IPv6 too.
	IPv6 bool
}

// A Backend makes permissions stand as expectations. Its methods must not be
// called concurrently, except List, which may run beside all others.
type Backend struct {
	cfg     Config
	c       *conn
	enc     encoder
	helpers helpers
	max     int // expectations that may be ours

	standing anchors
	onPort   map[port]int

	// The batch that is under way, kept here so that it costs no allocation.
	perms   []cone.Permission
	anchors [batch]anchor
	errs    [batch][3]error
	first   uint32
	per     int // messages per permission
	failed  func(seq uint32, err error)
}

type port struct {
	ext  cone.Endpoint
	zone uint16
}

// Open finds out by trying which helper the kernel offers for anchors, and
// returns a Backend that uses it. It leaves nothing in the kernel but, where
// the kernel has nfnetlink_cthelper, the helper "conenat".
func Open(cfg Config) (*Backend, error) {
	c, err := dial(cfg.NetNS)
	if err != nil {
		return nil, err
	}
	b := &Backend{cfg: cfg, c: c, standing: make(anchors), onPort: make(map[port]int)}
	b.failed = func(seq uint32, err error) {
		if n := int(seq - b.first); n >= 0 && n < b.per*len(b.perms) {
			b.errs[n/b.per][n%b.per] = err
		}
	}
	if b.helpers, err = chooseHelpers(c, cfg); err != nil {
		c.close()
		return nil, err
	}
	b.SetTableSize(defaultTable)
	if err := b.adopt(); err != nil {
		return nil, errors.Join(err, b.Close())
	}
	return b, nil
}

// adopt takes over what an earlier daemon left, so that it can be revoked,
// refreshed or granted again.
func (b *Backend) adopt() error {
	return list(b.cfg.NetNS, func(x *expectation) {
		p := x.permission()
		b.standing[x.anchor()] = p.Ext.Addr
		b.onPort[port{p.Ext, p.Zone}]++
	})
}

// defaultTable is the kernel's least expectation table.
const defaultTable = 1024

// SetTableSize tells the size of the kernel's expectation table
// (nf_conntrack_expect_max).
func (b *Backend) SetTableSize(n int) { b.max = n * tableShare / 100 }

// Max returns how many permissions the backend will let stand.
func (b *Backend) Max() int { return b.max }

// Helpers returns the names of the helpers in use for IPv4 and IPv6.
func (b *Backend) Helpers() (ipv4, ipv6 string) { return b.helpers.v4.name, b.helpers.v6.name }

// Standing returns how many permissions the backend made and has not revoked.
func (b *Backend) Standing() int { return len(b.standing) }

// Close removes the helper "conenat", unless it is still in use, and closes the
// connection. It revokes nothing.
func (b *Backend) Close() error {
	return errors.Join(b.helpers.unregister(b.c), b.c.close())
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
	anchorTime, expectTime := b.timeouts()
	b.begin(ps, 3)
	sent := 0
	for i := range ps {
		p := &ps[i]
		reason := b.reserve(p, &b.anchors[i])
		if reason != cone.ReasonNone {
			b.errs[i][0] = refusal(reason)
			continue
		}
		seq := b.first + uint32(3*i)
		h := b.helpers.of(p)
		b.enc.newAnchor(seq, p, b.anchors[i], h.name, anchorTime)
		b.enc.newExpect(seq+1, p, b.anchors[i])
		sent = 3*i + 2
		if !h.suits(expectTime) {
			b.enc.renewExpect(seq+2, p, b.anchors[i], expectTime)
			sent = 3*i + 3
		}
	}
	if err := b.exchange(sent); err != nil {
		for i := range ps {
			b.errs[i][0] = err
		}
	}
	for i := range ps {
		p, errs := &ps[i], b.errs[i]
		if errs == [3]error{} {
			continue
		}
		var r refusal
		if errors.As(errs[0], &r) {
			refused(base+i, cone.Reason(r), nil)
			continue
		}
		reason, err := b.mend(p, b.anchors[i], errs)
		if reason != cone.ReasonNone {
			b.release(p, b.anchors[i])
			refused(base+i, reason, err)
		}
	}
}

// refusal is an error that stands for a reason of our own.
type refusal cone.Reason

func (r refusal) Error() string { return cone.Reason(r).String() }

// reserve finds the anchor of p and holds the caps.
func (b *Backend) reserve(p *cone.Permission, a *anchor) cone.Reason {
	found, stands, ok := b.standing.of(p)
	at := port{p.Ext, p.Zone}
	switch {
	case !ok:
		return cone.ReasonTaken
	case stands:
		*a = found
		return cone.ReasonNone
	case b.onPort[at] >= maxPeersOnPort:
		return cone.ReasonPeersOnPort
	case len(b.standing) >= b.max:
		return cone.ReasonTableFull
	}
	*a = found
	b.standing[found] = p.Ext.Addr
	b.onPort[at]++
	return cone.ReasonNone
}

func (b *Backend) release(p *cone.Permission, a anchor) {
	if _, ok := b.standing[a]; !ok {
		return
	}
	delete(b.standing, a)
	at := port{p.Ext, p.Zone}
	if b.onPort[at]--; b.onPort[at] == 0 {
		delete(b.onPort, at)
	}
}

// begin starts a batch for ps with per messages each.
func (b *Backend) begin(ps []cone.Permission, per int) {
	b.enc.reset()
	b.perms, b.per = ps, per
	b.first = b.c.nextSeq(per * len(ps))
	for i := range ps {
		b.errs[i] = [3]error{}
	}
}

// exchange sends the batch, whose last message is number sent.
func (b *Backend) exchange(sent int) error {
	if sent == 0 {
		return nil
	}
	b.enc.ack()
	return b.c.exchange(b.enc.b, b.first+uint32(sent)-1, b.failed, nil)
}

// mend tries once more where the kernel refused p, after taking away what was
// in the way and is ours: the leavings of a daemon that died, or an entry that
// an inside host made by sending from port 0. What stays in the kernel then is
// either all of p or nothing.
func (b *Backend) mend(p *cone.Permission, a anchor, errs [3]error) (cone.Reason, error) {
	anchorTime, expectTime := b.timeouts()
	err := errors.Join(errs[:]...)
	retry := false
	for _, e := range errs {
		switch {
		case errors.Is(e, unix.EEXIST), errors.Is(e, unix.EBUSY):
			retry = true
		case errors.Is(e, unix.EAGAIN), errors.Is(e, unix.EOPNOTSUPP):
			// The helper is gone, or not loaded yet.
			b.helpers.register(b.c, expectTime)
			retry = true
		}
	}
	if !retry {
		b.remove(p, a)
		return reasonOf(err), err
	}

	if x, found := b.get(&p.Key); found {
		old := x.permission()
		switch {
		case !x.ours():
			b.remove(nil, a)
			return cone.ReasonTaken, err
		case old.Key == p.Key && old.Int == p.Int && x.anchor() == a:
			// It stands already. Renew it without a gap.
			errs = b.three(func(seq uint32) {
				b.enc.renewAnchor(seq, p, a, anchorTime)
				b.enc.renewExpect(seq+1, p, a, expectTime)
			})
			if errs == [3]error{} {
				return cone.ReasonNone, nil
			}
		}
		b.remove(p, x.anchor())
		if x.anchor() != a {
			b.release(&old, x.anchor())
		}
	}
	b.remove(p, a)
	errs = b.three(func(seq uint32) {
		b.enc.newAnchor(seq, p, a, b.helpers.of(p).name, anchorTime)
		b.enc.newExpect(seq+1, p, a)
		b.enc.renewExpect(seq+2, p, a, expectTime)
	})
	if err = errors.Join(errs[:]...); err != nil {
		b.remove(p, a)
		return reasonOf(err), err
	}
	return cone.ReasonNone, nil
}

func reasonOf(err error) cone.Reason {
	switch {
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENFILE):
		return cone.ReasonTableFull
	case errors.Is(err, unix.EEXIST), errors.Is(err, unix.EBUSY):
		return cone.ReasonTaken
	}
	return cone.ReasonKernel
}

// three sends up to three messages on their own and returns their errors.
func (b *Backend) three(encode func(seq uint32)) (errs [3]error) {
	b.enc.reset()
	first := b.c.nextSeq(3)
	encode(first)
	b.enc.ack()
	err := b.c.exchange(b.enc.b, b.enc.lastSeq(), func(seq uint32, err error) {
		if n := seq - first; n < 3 {
			errs[n] = err
		}
	}, nil)
	if err != nil {
		errs[0] = err
	}
	return errs
}

// remove takes the expectation of p, unless p is nil, and the anchor a out of
// the kernel. They may be gone already. The expectation goes first: the kernel
// need not race the two.
func (b *Backend) remove(p *cone.Permission, a anchor) {
	b.three(func(seq uint32) {
		if p != nil {
			b.enc.deleteExpect(seq, &p.Key)
		}
		b.enc.deleteAnchor(seq+1, a)
	})
}

// get returns the kernel's expectation for k, anybody's.
func (b *Backend) get(k *cone.Key) (x expectation, found bool) {
	b.enc.reset()
	seq := b.c.nextSeq(1)
	b.enc.getExpect(seq, k)
	b.enc.ack()
	err := b.c.exchange(b.enc.b, seq, func(uint32, error) {}, func(typ uint16, body []byte) {
		if typ == subsysExpect<<8|msgNew {
			x, found = parseExpectation(body)
		}
	})
	return x, found && err == nil
}

// Revoke ends ps. What is gone already is no error; other errors are joined.
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
	b.begin(ps, 2)
	sent := 0
	for i := range ps {
		a, stands, _ := b.standing.of(&ps[i])
		if !stands {
			continue // not ours, or revoked
		}
		seq := b.first + uint32(2*i)
		b.enc.deleteExpect(seq, &ps[i].Key)
		b.enc.deleteAnchor(seq+1, a)
		b.release(&ps[i], a)
		sent = 2*i + 2
	}
	err := b.exchange(sent)
	for i := range ps {
		for _, e := range b.errs[i] {
			if e != nil && !errors.Is(e, unix.ENOENT) {
				err = errors.Join(err, fmt.Errorf("revoke %v -> %v: %w", ps[i].Peer, ps[i].Ext, e))
			}
		}
	}
	return err
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
	b.begin(ps, 2)
	sent := 0
	for i := range ps {
		a, stands, _ := b.standing.of(&ps[i])
		if !stands {
			b.errs[i][0] = unix.ENOENT
			continue
		}
		seq := b.first + uint32(2*i)
		b.enc.renewAnchor(seq, &ps[i], a, anchorTime) // never to expire under its expectation
		b.enc.renewExpect(seq+1, &ps[i], a, expectTime)
		sent = 2*i + 2
	}
	err := b.exchange(sent)
	for i := range ps {
		if err != nil || b.errs[i] != [3]error{} {
			lost(base + i)
		}
	}
}
