package expect

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// OwnName returns the name of our helper in the network namespace behind the descriptor
// netns, 0 for the current. It is 15 bytes long, the most that a name may have.
func OwnName(netns int) (string, error) {
	var st unix.Stat_t
	err := unix.Fstat(netns, &st)
	if netns == 0 {
		err = unix.Stat("/proc/thread-self/ns/net", &st)
	}
	if err != nil {
		return "", fmt.Errorf("look at network namespace: %w", err)
	}
	return fmt.Sprintf("%s-%07x", nfnl.OwnHelper, st.Ino&0xfffffff), nil
}

// A helper is a conntrack helper that works on anchors. policy is the timeout, in seconds,
// that it gives to an expectation.
type helper struct {
	name   string
	policy uint32
}

// suits reports whether an expectation may keep the helper's own timeout until it is
// renewed, after half of timeout: that saves a grant one message.
func (h helper) suits(timeout uint32) bool {
	return h.policy <= timeout && h.policy >= timeout-timeout/4
}

// helpers are the helpers in use, by family; one without a name says that there is none.
type helpers struct {
	v4, v6 helper
	own    string // the name of our own helper, in use or not
}

func (h *helpers) of(p *cone.Permission) helper {
	if p.Peer.Is4() {
		return h.v4
	}
	return h.v6
}

// ErrNoHelper says that the kernel has no helper that can be on an anchor.
var ErrNoHelper = errors.New("the kernel offers no conntrack helper for UDP: " +
	"load one of the modules nfnetlink_cthelper, nf_conntrack_h323, nf_conntrack_netbios_ns, nf_conntrack_tftp")

// chooseHelpers finds for each family the first helper that works. To try one it makes a
// real anchor and expectation on documentation addresses (RFC 5737, RFC 3849).
func chooseHelpers(c *nfnl.Conn, cfg Config) (helpers, error) {
	var h helpers
	var err error
	if h.own, err = OwnName(cfg.NetNS); err != nil {
		return helpers{}, err
	}
	registerOwn(c, h.own, seconds(cfg.Lifetime))
	names := append([]string{h.own}, nfnl.KernelHelpers...)
	h.v4, err = chooseHelper(c, names, false)
	if err == nil && (cfg.IPv6 || cfg.MayIPv6) {
		h.v6, err = chooseHelper(c, names, true)
		if !cfg.IPv6 && errors.Is(err, ErrNoHelper) {
			err = nil
		}
	}
	if err != nil {
		return helpers{}, errors.Join(err, unregisterOwn(c, h.own))
	}
	return h, nil
}

func chooseHelper(c *nfnl.Conn, names []string, v6 bool) (helper, error) {
	var errs []error
	for _, name := range names {
		policy, err := tryHelper(c, name, v6)
		if err == nil {
			return helper{name, policy}, nil
		}
		if errors.Is(err, unix.EPERM) {
			return helper{}, nfnl.Permitted(err)
		}
		errs = append(errs, fmt.Errorf("%s: %w", name, err))
	}
	return helper{}, fmt.Errorf("%w (%w)", ErrNoHelper, errors.Join(errs...))
}

// tryHelper makes a permission stand with the helper and removes it again. It returns the
// timeout that the expectation had from its helper.
func tryHelper(c *nfnl.Conn, name string, v6 bool) (policy uint32, err error) {
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
	b := newBackend(Config{}, c)
	a := anchorOf(&p, false)
	if err := b.clear(&p, a); err != nil { // left by a probe that was killed
		return 0, err
	}
	defer func() { err = errors.Join(err, b.clear(&p, a)) }()
	for range 3 {
		errs := b.exchange(func(seq uint32) {
			b.enc.newAnchor(seq, &p, a, name, 10)
			b.enc.newExpect(seq+1, &p, a)
		})
		if errors.Is(errs[0], unix.EAGAIN) { // the kernel has just loaded the helper's module
			continue
		}
		if errs.failed() {
			return 0, errs.cause()
		}
		x, found, err := b.get(&p.Key)
		if err != nil {
			return 0, err
		}
		if !found || !x.stands(&p, a) {
			return 0, errors.New("the expectation is not what was asked for")
		}
		return x.timeout, b.exchange(func(seq uint32) { b.enc.renewExpect(seq, &p, a, 5) })[0]
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

// registerOwn registers our helper for both families, with the timeout, in seconds, that an
// expectation gets. It ignores errors: if the helper does not work, tryHelper finds out.
func registerOwn(c *nfnl.Conn, name string, timeout uint32) {
	var e encoder
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		e.Reset()
		e.Message(subsysHelper, msgNew, create, c.NextSeq(1), family)
		e.Str(nfcthName, name)
		tuple := e.Nest(nfcthTuple)
		e.BE16(nfcthTupleL3, uint16(family))
		e.U8(nfcthTupleL4, unix.IPPROTO_UDP)
		e.EndNest(tuple)
		policy := e.Nest(nfcthPolicy)
		e.BE32(nfcthPolicyNum, 1)
		set := e.Nest(nfcthPolicySet1)
		e.Str(nfcthSetName, name)
		e.BE32(nfcthSetMax, 1)
		e.BE32(nfcthSetTimeout, timeout)
		e.EndNest(set)
		e.EndNest(policy)
		e.BE32(nfcthPrivLen, 0)
		e.BE32(nfcthStatus, 0) // disabled: it never queues a packet
		e.End()
		_ = c.Ask(&e.Encoder, nil) // tryHelper finds out
	}
}

// register registers our own helper again if it is in use.
func (h *helpers) register(c *nfnl.Conn, timeout uint32) {
	if h.v4.name == h.own || h.v6.name == h.own {
		registerOwn(c, h.own, timeout)
	}
}

// unregister removes our own helper from the kernel if it was in use.
func (h *helpers) unregister(c *nfnl.Conn) error {
	if h.v4.name != h.own && h.v6.name != h.own {
		return nil
	}
	return unregisterOwn(c, h.own)
}

func unregisterOwn(c *nfnl.Conn, name string) error {
	var e encoder
	e.Message(subsysHelper, msgDelete, change, c.NextSeq(1), unix.AF_INET)
	e.Str(nfcthName, name)
	e.End()
	err := c.Ask(&e.Encoder, nil)
	switch {
	case errors.Is(err, unix.ENOENT), // there is none
		errors.Is(err, unix.EPERM),  // we could not have registered it either
		errors.Is(err, unix.EINVAL), // the kernel has no nfnetlink_cthelper
		errors.Is(err, unix.EOPNOTSUPP):
		return nil
	case err != nil:
		return fmt.Errorf("unregister helper %s: %w", name, err)
	}
	return nil
}
