package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// WaysBack says what policy routing rules do to the look-up of the way back to the source of a
// packet. The fib expression of nftables looks that up as if the gateway sent the answers itself,
// without ports, and with the packet's own mark and type of service.
type WaysBack struct {
	// Hidden says that a rule selects by something that only the answers to a UDP packet have: a
	// mark (ip rule add fwmark) in other bits than ours, the incoming link (iif), ports, a type of
	// service or a tunnel. Then the packet alone does not tell the way back. What such a rule does
	// does not matter: goto may skip the rule that leads back, and suppress_prefixlength and
	// suppress_ifgroup its route. Without such a selector it does the same in both look-ups.
	Hidden bool
	// BySource says that a rule selects by source (from). The answers have another one than the
	// packet's destination if a rule of the user's translates that.
	BySource bool
}

// ReadWaysBack reads the rules of a network namespace. The bits of ours are not set in marks when
// the way back is looked up.
func ReadWaysBack(netns int, ours uint32) (ways WaysBack, err error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return ways, err
	}
	defer func() { _ = c.Close() }()
	err = nfnl.Uninterrupted(func() error {
		ways = WaysBack{}
		c.begin(unix.RTM_GETRULE, unix.NLM_F_DUMP, fibRuleHeaderLen)
		return c.exchange(func(b []byte) error {
			rule, err := decodeRule(b)
			if err == nil && (b[0] == unix.AF_INET || b[0] == unix.AF_INET6) { // not ip mrule
				ways.Hidden = ways.Hidden || rule.hidesWayBack(ours)
				ways.BySource = ways.BySource || rule.bySource
			}
			return err
		})
	})
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // a kernel without policy routing
		return WaysBack{}, nil
	case err != nil:
		return WaysBack{}, fmt.Errorf("read rules of policy routing: %w", err)
	}
	return ways, nil
}

const fibRuleHeaderLen = 12 // struct fib_rule_hdr

// A Rule is a routing rule.
type Rule struct {
	Mark   uint32
	mask   uint32 // of Mark
	invert bool   // it matches the packets that it does not describe
	ofWay  bool   // it selects by link or ports, which packets of the other direction do not show
	proto  uint8  // the protocol that it selects; 0 for any
	tos    uint8  // the type of service that it selects, if byTOS
	byTOS  bool
	hidden bool   // it selects by something that a Router does not try
	all    string // the whole message

	bySource bool // it selects by the source address
}

// decodeRule decodes a struct fib_rule_hdr with attributes.
func decodeRule(b []byte) (r Rule, err error) {
	const fraDSCP, fraSportMask, fraDportMask, fraDSCPMask = 25, 28, 29, 30 // Linux 6.13, and 6.15 for the masks
	const wholeDSCP = 1<<6 - 1
	if len(b) < fibRuleHeaderLen {
		return r, nfnl.ErrMalformed
	}
	r = Rule{
		mask: math.MaxUint32, invert: binary.NativeEndian.Uint32(b[8:])&unix.FIB_RULE_INVERT != 0,
		tos: b[3], byTOS: b[3] != 0, bySource: b[2] != 0,
		all: string(b),
	}
	err = attributes(b, fibRuleHeaderLen, func(typ uint16, v []byte) {
		switch {
		case typ == unix.FRA_FWMARK:
			r.Mark = word(v)
		case typ == unix.FRA_FWMASK:
			r.mask = word(v)
		case typ == unix.FRA_IIFNAME, typ == unix.FRA_SPORT_RANGE, typ == unix.FRA_DPORT_RANGE:
			r.ofWay = true
		case typ == unix.FRA_IP_PROTO:
			r.proto = octet(v)
		case typ == fraSportMask, typ == fraDportMask: // comes with the ports
		case typ == fraDSCP:
			r.tos, r.byTOS = octet(v)<<2, true
		case typ == fraDSCPMask:
			r.hidden = r.hidden || octet(v) != wholeDSCP
		case typ == unix.FRA_TUN_ID, typ > unix.FRA_DPORT_RANGE: // a flow label, among others
			r.hidden = true
		}
	})
	return r, err
}

// hidesWayBack reports whether the rule is one of WaysBack.Hidden. A rule for
// mark 0, which may have a mask alone, selects packets without a mark and does not count. A
// protocol counts because old kernels look up the way back without it; a rule for another
// protocol than UDP never counts.
func (r Rule) hidesWayBack(ours uint32) bool {
	if r.proto != 0 && r.proto != unix.IPPROTO_UDP {
		return false
	}
	return r.hidden || r.ofWay || r.byTOS || r.proto != 0 || r.Mark != 0 && (r.mask&^ours != 0 || r.invert)
}

// rule decodes a routing rule.
func (r *reader) rule(b []byte) error {
	if len(b) < fibRuleHeaderLen {
		return nil
	}
	rule, err := decodeRule(b)
	switch b[0] {
	case unix.AF_INET:
		r.Rules = append(r.Rules, rule)
	case unix.AF_INET6:
		r.Rules6 = append(r.Rules6, rule)
	}
	return err
}
