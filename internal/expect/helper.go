package expect

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
	"golang.org/x/sys/unix"
)

// OwnHelper is the name of our own helper: a user-space helper
// (nfnetlink_cthelper) that is left disabled, so it never sees a packet.
const OwnHelper = "conenat"

// candidates are the helpers that can sit on an anchor, best first. Those of
// the kernel would parse packets, but an anchor never gets one.
var candidates = []string{OwnHelper, "RAS", "netbios-ns", "tftp", "amanda"}

// A helper is one that works. Policy is the timeout, in seconds, that it gives
// to an expectation.
type helper struct {
	name   string
	policy uint32
}

// suits reports whether an expectation may have the helper's own timeout until
// it is refreshed, after half of timeout: then a grant is a message shorter.
func (h helper) suits(timeout uint32) bool {
	return h.policy <= timeout && h.policy >= timeout-timeout/4
}

// helpers are those in use, by family; without a name where there is none.
type helpers struct{ v4, v6 helper }

func (h *helpers) of(p *cone.Permission) helper {
	if p.Peer.Is4() {
		return h.v4
	}
	return h.v6
}

// ErrNoHelper says that the kernel has no helper that can sit on an anchor.
var ErrNoHelper = errors.New("the kernel offers no conntrack helper for UDP: " +
	"load one of the modules nfnetlink_cthelper, nf_conntrack_h323, nf_conntrack_netbios_ns, nf_conntrack_tftp")

// chooseHelpers finds for each family the first helper that works, by making a
// real anchor and expectation on documentation addresses (RFC 5737, RFC 3849).
func chooseHelpers(c *conn, cfg Config) (helpers, error) {
	var h helpers
	registerOwn(c, seconds(cfg.Lifetime))
	var err error
	h.v4, err = chooseHelper(c, false)
	if err == nil && cfg.IPv6 {
		h.v6, err = chooseHelper(c, true)
	}
	if err != nil {
		return helpers{}, errors.Join(err, unregisterOwn(c))
	}
	return h, nil
}

func chooseHelper(c *conn, v6 bool) (helper, error) {
	var errs []error
	for _, name := range candidates {
		policy, err := tryHelper(c, name, v6)
		if err == nil {
			return helper{name, policy}, nil
		}
		if errors.Is(err, unix.EPERM) {
			return helper{}, fmt.Errorf("create conntrack entry: %w: run as root or with CAP_NET_ADMIN", err)
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return helper{}, fmt.Errorf("%w (%w)", ErrNoHelper, errors.Join(errs...))
}

// tryHelper makes a permission stand with the helper and takes it away again. It
// returns the timeout that the expectation had before it was set.
func tryHelper(c *conn, name string, v6 bool) (policy uint32, err error) {
	in, ext, peer := "192.0.2.1:9", "198.51.100.1:9", "203.0.113.1"
	if v6 {
		in, ext, peer = "[2001:db8::1]:9", "[2001:db8::1]:9", "2001:db8::2"
	}
	p := cone.Permission{
		Key: cone.Key{
			Ext:  cone.EndpointFrom(netip.MustParseAddrPort(ext)),
			Peer: cone.AddrFrom(netip.MustParseAddr(peer)),
		},
		Int: cone.EndpointFrom(netip.MustParseAddrPort(in)),
	}
	b := &Backend{c: c}
	a := anchorOf(&p, false)
	b.remove(&p, a) // of a probe that was killed
	defer b.remove(&p, a)
	for range 3 {
		errs := b.three(func(seq uint32) {
			b.enc.newAnchor(seq, &p, a, name, 10)
			b.enc.newExpect(seq+1, &p, a)
		})
		if errors.Is(errs[0], unix.EAGAIN) { // the kernel just loaded its module
			continue
		}
		if err := errors.Join(errs[:]...); err != nil {
			return 0, err
		}
		x, found := b.get(&p.Key)
		if !found || !x.ours() {
			return 0, unix.ENOENT
		}
		return x.timeout, b.three(func(seq uint32) { b.enc.renewExpect(seq, &p, a, 5) })[0]
	}
	return 0, unix.EAGAIN
}

// Attributes of nfnetlink_cthelper.h.
const (
	nfcthName       = 1
	nfcthTuple      = 2
	nfcthPolicy     = 4
	nfcthPrivLen    = 5
	nfcthStatus     = 6
	nfcthTupleL3    = 1
	nfcthTupleL4    = 2
	nfcthPolicyNum  = 1
	nfcthPolicySet1 = 2
	nfcthSetName    = 1
	nfcthSetMax     = 2
	nfcthSetTimeout = 3
)

// registerOwn registers our helper for both families, with the timeout, in
// seconds, that an expectation gets. Where the kernel cannot, or it is
// registered already, tryHelper finds out.
func registerOwn(c *conn, timeout uint32) {
	var e encoder
	for _, v6 := range []bool{false, true} {
		e.reset()
		seq := c.nextSeq(1)
		e.message(subsysHelper, msgNew, create, seq, v6)
		e.str(nfcthName, OwnHelper)
		tuple := e.nest(nfcthTuple)
		l3 := uint16(unix.AF_INET)
		if v6 {
			l3 = unix.AF_INET6
		}
		e.be16(nfcthTupleL3, l3)
		e.u8(nfcthTupleL4, unix.IPPROTO_UDP)
		e.endNest(tuple)
		policy := e.nest(nfcthPolicy)
		e.be32(nfcthPolicyNum, 1)
		set := e.nest(nfcthPolicySet1)
		e.str(nfcthSetName, OwnHelper)
		e.be32(nfcthSetMax, 1)
		e.be32(nfcthSetTimeout, timeout)
		e.endNest(set)
		e.endNest(policy)
		e.be32(nfcthPrivLen, 0)
		e.be32(nfcthStatus, 0) // disabled: it never queues a packet
		e.end()
		e.ack()
		_ = c.exchange(e.b, seq, func(uint32, error) {}, nil) // tryHelper tells
	}
}

// register registers our own helper again if it is in use.
func (h *helpers) register(c *conn, timeout uint32) {
	if h.v4.name == OwnHelper || h.v6.name == OwnHelper {
		registerOwn(c, timeout)
	}
}

// unregister takes our own helper out of the kernel if it was in use. One that
// another network namespace still uses stays.
func (h *helpers) unregister(c *conn) error {
	if h.v4.name != OwnHelper && h.v6.name != OwnHelper {
		return nil
	}
	return unregisterOwn(c)
}

func unregisterOwn(c *conn) error {
	var e encoder
	seq := c.nextSeq(1)
	e.message(subsysHelper, msgDelete, change, seq, false)
	e.str(nfcthName, OwnHelper)
	e.end()
	e.ack()
	var refused error
	err := c.exchange(e.b, seq, func(_ uint32, err error) { refused = err }, nil)
	switch {
	case err != nil:
		return err
	case errors.Is(refused, unix.ENOENT), // both: there is none
		errors.Is(refused, unix.EINVAL), // or the kernel has no nfnetlink_cthelper
		errors.Is(refused, unix.EOPNOTSUPP),
		errors.Is(refused, unix.EBUSY): // another namespace uses it
		return nil
	case refused != nil:
		return fmt.Errorf("unregister helper %s: %w", OwnHelper, refused)
	}
	return nil
}
