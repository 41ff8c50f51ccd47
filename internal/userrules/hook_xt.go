package userrules

import (
	"encoding/binary"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Bits of an iptables state mask; see XT_CONNTRACK_STATE_BIT.
const (
	xtStateInvalid     = 1 << 0
	xtStateEstablished = 1 << 1
	xtStateRelated     = 1 << 2
	xtStateNew         = 1 << 3
	xtStateSNAT        = 1 << 6
	xtStateDNAT        = 1 << 7
)

// natTargets are the targets that translate packets.
var natTargets = []string{"MASQUERADE", "SNAT", "NETMAP", "DNAT", "REDIRECT"}

// xtTarget returns what a target of iptables-nft does with a packet. Empty fates mean that
// the rule continues.
func xtTarget(t *expr.Target) fates {
	switch t.Name {
	case "REJECT", "DROP":
		return drops
	case "ACCEPT":
		return accepts
	case "LOG", "NFLOG", "ULOG", "AUDIT", "TRACE", "MARK", "CONNMARK", "SECMARK", "CONNSECMARK", "CT",
		"CLASSIFY", "DSCP", "TOS", "TTL", "HL", "ECN", "TCPMSS", "TCPOPTSTRIP", "CHECKSUM", "SET", "TEE",
		"IDLETIMER", "LED", "HMARK", "RATEEST", "FLOWOFFLOAD", "NOTRACK":
		return 0 // XT_CONTINUE
	case "NFQUEUE":
		return accepts | drops
	}
	return anyFate
}

// xtMatch returns the chance that a match of iptables-nft matches.
func (c *child) xtMatch(m *expr.Match) chance {
	switch info := m.Info.(type) {
	case *xt.Comment:
		return always
	case *xt.Tcp:
		return never
	case *xt.Udp:
		return xtPorts(c.sourcePort(), info.SrcPorts).inverted(info.InvFlags&xt.UdpInvSrcPorts != 0).
			and(xtPorts(c.destinationPort(), info.DstPorts).inverted(info.InvFlags&xt.UdpInvDestPorts != 0))
	case *xt.ConntrackMtinfo1:
		return c.xtConntrack(info.ConntrackMtinfoBase, uint16(info.StateMask), uint16(info.StatusMask)).and(c.xtOriginalPorts(nil, info.MatchFlags))
	case *xt.ConntrackMtinfo2:
		return c.xtConntrack(info.ConntrackMtinfoBase, info.StateMask, info.StatusMask).and(c.xtOriginalPorts(nil, info.MatchFlags))
	case *xt.ConntrackMtinfo3:
		return c.xtConntrack(info.ConntrackMtinfoBase, info.StateMask, info.StatusMask).and(c.xtOriginalPorts(info, info.MatchFlags))
	case *xt.AddrType:
		return c.xtAddrType(info.Source, info.Dest, info.InvertDest)
	case *xt.AddrTypeV1:
		const invertDest, limits = 2, 4 | 8
		if info.Flags&limits != 0 {
			return maybe
		}
		return c.xtAddrType(info.Source, info.Dest, info.Flags&invertDest != 0)
	case *xt.Unknown:
		return c.xtUnknown(m.Name, m.Rev, *info)
	}
	return maybe
}

func (c *child) xtUnknown(name string, rev uint32, info []byte) chance {
	switch name {
	case "comment":
		return always
	case "icmp", "icmp6", "sctp", "dccp", "ah", "esp":
		return never // another protocol
	case "state":
		if len(info) < 4 {
			return maybe
		}
		return certain(binary.NativeEndian.Uint32(info)&uint32(c.xtState()) != 0)
	case "physdev":
		// struct xt_physdev_info: four names and masks, invert, bitmask. A routed packet is
		// not bridged (XT_PHYSDEV_OP_BRIDGED).
		const invert, bitmask, bridged = 64, 65, 4
		if len(info) > bitmask && info[bitmask]&bridged != 0 && info[invert]&bridged == 0 {
			return never
		}
	case "mark":
		return xtMark(c.mark, rev, info)
	case "connmark":
		if c.untracked {
			return never
		}
		return xtMark(c.flowMark, rev, info)
	case "rpfilter":
		const invert = 1 << 3 // XT_RPFILTER_INVERT
		if len(info) > 0 {
			return always.inverted(info[0]&invert != 0) // as fib says
		}
	case "helper":
		return c.xtHelper(info)
	case "multiport":
		return c.xtMultiport(rev, info)
	case "set":
		// struct xt_set_info: index, dim, flags; bit 0 of flags inverts.
		if rev >= 1 && len(info) >= 4 {
			return rarely.inverted(info[3]&1 != 0)
		}
	}
	return maybe
}

// xtMark returns the chance that a mark is the one in a struct xt_mark_mtinfo1, or
// xt_connmark_mtinfo1: mark, mask, invert.
func xtMark(m []cell, rev uint32, info []byte) chance {
	if m == nil || rev != 1 || len(info) < 9 {
		return maybe
	}
	return maskedEquals(m, info[:4], info[4:8]).inverted(info[8] != 0)
}

// xtHelper follows helper_mt in the kernel. Struct xt_helper_info has the number invert, and a name
// of which the first bytes of the helper's are compared, or an empty one for any helper.
func (c *child) xtHelper(info []byte) chance {
	const name = 4
	if len(info) <= name {
		return maybe
	}
	match := never
	if c.has(expr.CtKeyHELPER) {
		asked := helperName(info[name:])
		match = certain(asked == "")
		begins := func(name string) bool { return strings.HasPrefix(asked, name) }
		if begins(nfnl.OwnHelper) || slices.ContainsFunc(nfnl.KernelHelpers, begins) || c.state != expr.CtStateBitRELATED {
			match = maybe
		}
	}
	return match.inverted(binary.NativeEndian.Uint32(info) != 0)
}

func (c *child) sourcePort() []cell      { return c.transport[:2] }
func (c *child) destinationPort() []cell { return c.transport[2:4] }

func xtPorts(port []cell, ports [2]uint16) chance {
	span := portSpan(ports[0], ports[1])
	in, _ := within(port, span.low, span.high)
	return in
}

// xtMultiport returns the chance that a match for several ports matches.
func (c *child) xtMultiport(rev uint32, info []byte) chance {
	if len(info) < multiportSize {
		return maybe
	}
	spans, ok := multiportSpans(rev, info)
	match := never
	for i, port := range [][]cell{c.sourcePort(), c.destinationPort()} {
		switch {
		case info[0] == multiportDestination && i == 0, info[0] == multiportSource && i == 1:
		case !ok:
			match = max(match, rarely)
		default:
			for _, s := range spans {
				in, _ := within(port, s.low, s.high)
				match = max(match, in)
			}
		}
	}
	return match.inverted(info[multiportInvert] != 0)
}

func (c *child) xtState() uint16 {
	switch {
	case c.untracked:
		return xtStateInvalid
	case c.state == expr.CtStateBitRELATED:
		return xtStateRelated
	case c.state == expr.CtStateBitESTABLISHED:
		return xtStateEstablished
	}
	return xtStateNew
}

// xtConntrack follows conntrack_mt in the kernel.
func (c *child) xtConntrack(info xt.ConntrackMtinfoBase, stateMask, statusMask uint16) chance {
	does := func(f xt.ConntrackFlags) bool { return info.MatchFlags&uint16(f) != 0 }
	inverts := func(f xt.ConntrackFlags) bool { return info.InvertFlags&uint16(f) != 0 }
	match := always
	if does(xt.ConntrackState) {
		one := never
		switch {
		case stateMask&c.xtState() != 0:
			one = always
		case stateMask&xtStateSNAT != 0 && !c.untracked:
			one = maybe
		}
		if stateMask&xtStateDNAT != 0 && !c.untracked {
			one = max(one, c.hasStatus(statusDstNAT))
		}
		match = match.and(one.inverted(inverts(xt.ConntrackState)))
	}
	switch {
	case c.untracked && does(xt.ConntrackState):
		return match
	case c.untracked:
		return never
	}
	if does(xt.ConntrackStatus) {
		match = match.and(c.hasStatus(uint32(statusMask)).inverted(inverts(xt.ConntrackStatus)))
	}
	if does(xt.ConntrackProto) {
		match = match.and(certain(info.L4Proto == unix.IPPROTO_UDP).inverted(inverts(xt.ConntrackProto)))
	}
	if does(xt.ConntrackDirection) {
		match = match.and(certain(!c.answers).inverted(inverts(xt.ConntrackDirection)))
	}
	if does(xt.ConntrackReplSrc) {
		host := c.replies
		if host == nil {
			host = c.network[c.destination():]
		}
		match = match.and(maskedEquals(host, info.ReplSrcAddr, info.ReplSrcMask).inverted(inverts(xt.ConntrackReplSrc)))
	}
	if does(xt.ConntrackOrigSrc) {
		one := maybe
		if c.begins() {
			one = maskedEquals(c.source(), info.OrigSrcAddr, info.OrigSrcMask).inverted(inverts(xt.ConntrackOrigSrc))
		}
		match = match.and(one)
	}
	const others = xt.ConntrackOrigDst | xt.ConntrackReplDst | xt.ConntrackReplSrcPort | xt.ConntrackReplDstPrt | xt.ConntrackExpires
	if does(others) {
		match = match.and(maybe)
	}
	return match
}

// xtOriginalPorts returns the chance that the ports match with which the flow began. Before revision 3,
// where info is nil, they are not evaluated.
func (c *child) xtOriginalPorts(info *xt.ConntrackMtinfo3, flags uint16) chance {
	const ports = xt.ConntrackOrigSrcPort | xt.ConntrackOrigDstPort
	switch {
	case flags&uint16(ports) == 0:
		return always
	case info == nil || !c.begins():
		return maybe
	}
	does := func(f xt.ConntrackFlags) bool { return flags&uint16(f) != 0 }
	inverts := func(f xt.ConntrackFlags) bool { return info.InvertFlags&uint16(f) != 0 }
	match := always
	if does(xt.ConntrackOrigSrcPort) {
		one := xtPorts(c.sourcePort(), [2]uint16{info.OrigSrcPort, info.OrigSrcPortHigh})
		match = match.and(one.inverted(inverts(xt.ConntrackOrigSrcPort)))
	}
	if does(xt.ConntrackOrigDstPort) {
		one := xtPorts(c.originalPort(), [2]uint16{info.OrigDstPort, info.OrigDstPortHigh})
		match = match.and(one.inverted(inverts(xt.ConntrackOrigDstPort)))
	}
	return match
}

// destination returns the offset of the destination address in the header.
func (c *child) destination() int {
	if c.family == unix.NFPROTO_IPV6 {
		return 24
	}
	return 16
}

// hasStatus returns the chance that a bit of mask is set.
func (c *child) hasStatus(mask uint32) chance {
	switch {
	case c.status&c.knownStatus&mask != 0:
		return always
	case mask&^c.knownStatus != 0:
		return maybe
	}
	return never
}

// maskedEquals returns the chance that an address is in a network.
func maskedEquals(address []cell, network, mask []byte) chance {
	if len(network) < len(address) || len(mask) < len(address) {
		return maybe
	}
	// The network may be an IPv4 address padded to 16 bytes.
	network, mask = network[len(network)-len(address):], mask[len(mask)-len(address):]
	masked := slices.Clone(address)
	for i := range masked {
		c := &masked[i]
		c.val &= mask[i]
		c.known |= ^mask[i]
		c.mask &= mask[i]
	}
	return equals(masked, network)
}

func (c *child) xtAddrType(source, dest uint16, invertDest bool) chance {
	match := always
	if source != 0 {
		match = match.and(maybe)
	}
	if dest != 0 {
		is := func(typ int) chance { return certain(dest&(1<<typ) != 0) }
		one := is(unix.RTN_UNICAST)
		switch local := is(unix.RTN_LOCAL); {
		case c.local == always:
			one = local
		case c.local == maybe && local != one:
			one = maybe
		}
		match = match.and(one.inverted(invertDest))
	}
	return match
}
