package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// RoutesByMark reports whether a rule of policy routing asks for a mark (ip rule add
// fwmark), in other bits than ours. Then nobody can tell the way back to a source before the
// mark is set, and the mark may be one that only the answers get.
func RoutesByMark(netns int, ours uint32) (is bool, err error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.close() }()
	for range attempts {
		is = false
		err = c.exchange(newRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP, fibRuleHeaderLen), func(b []byte) error {
			rule, err := decodeRule(b)
			is = is || rule.asksForMark(ours)
			return err
		})
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // a kernel without policy routing
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read rules of policy routing: %w", err)
	}
	return is, nil
}

const fibRuleHeaderLen = 12 // struct fib_rule_hdr

// A Rule is a routing rule.
type Rule struct {
	Mark   uint32
	mask   uint32 // of Mark
	invert bool   // it is for packets that it does not describe
	hidden bool   // it asks for what nobody knows of a packet, other than a mark
	all    string // the message
}

// decodeRule decodes a struct fib_rule_hdr with attributes.
func decodeRule(b []byte) (r Rule, err error) {
	const fraSportMask, fraDportMask = 28, 29 // Linux 6.15
	if len(b) < fibRuleHeaderLen {
		return r, errMalformed
	}
	r = Rule{
		mask: math.MaxUint32, invert: binary.NativeEndian.Uint32(b[8:])&unix.FIB_RULE_INVERT != 0,
		hidden: b[3] != 0, // the type of service
		all:    string(b),
	}
	err = attributes(b, fibRuleHeaderLen, func(ad *netlink.AttributeDecoder) {
		switch typ := ad.Type(); {
		case typ == unix.FRA_FWMARK:
			r.Mark = ad.Uint32()
		case typ == unix.FRA_FWMASK:
			r.mask = ad.Uint32()
		case typ == fraSportMask, typ == fraDportMask: // the kernel was told the ports
		case typ == unix.FRA_TUN_ID, typ > unix.FRA_DPORT_RANGE: // a DSCP, among others
			r.hidden = true
		}
	})
	return r, err
}

// asksForMark reports whether the rule asks for a mark in other bits than ours. A mark of 0
// asks for packets without one, and is not there as a rule. Any rule may have the mask alone.
func (r Rule) asksForMark(ours uint32) bool {
	return r.Mark != 0 && (r.mask&^ours != 0 || r.invert)
}

// rule takes in a routing rule for IPv4.
func (r *reader) rule(b []byte) error {
	if len(b) < fibRuleHeaderLen || b[0] != unix.AF_INET {
		return nil
	}
	rule, err := decodeRule(b)
	r.Rules = append(r.Rules, rule)
	return err
}
