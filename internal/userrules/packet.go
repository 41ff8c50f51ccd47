package userrules

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A child is the class of packets that a question is about: the first packet of a UDP flow
// from outside to a host of a subnet, as the forward hook or an earlier one sees it.
type child struct {
	untracked   bool   // conntrack has not seen it
	local       chance // its destination is an address of the gateway
	replies     []cell // the source of its answers; nil: that is its destination
	state       uint32 // conntrack state, with nft's bits
	status      uint32
	labelled    bool   // with nfnl.ChildLabel
	knownStatus uint32 // the bits of status that are known
	family      byte
	network     []cell // the header
	transport   []cell
	in, out     linkCells
	rewritten   bool // a rule has changed a header
	answers     bool // it belongs to a flow that its destination opened
	mark        []cell
	flowMark    []cell // the connmark; nil stands for any, as for mark
}

type linkCells struct{ name, index []cell }

// The bits of enum ip_conntrack_status.
const (
	statusExpected  = 1 << 0
	statusSeenReply = 1 << 1
	statusAssured   = 1 << 2
	statusConfirmed = 1 << 3
	statusDstNAT    = 1 << 5
)

// newChild returns the children of one kind that come by the link in (nil for any outside
// link) and leave by the link out (nil for any that is not outside) to a subnet.
func newChild(related bool, in, out *Link, outside []Link, subnet netip.Prefix, subnets []netip.Prefix) *child {
	c := &child{
		state:       expr.CtStateBitNEW,
		status:      statusDstNAT,
		labelled:    !related,
		knownStatus: statusExpected | statusSeenReply | statusAssured | statusConfirmed | statusDstNAT,
		family:      unix.NFPROTO_IPV4,
		transport:   slices.Concat(unknownBytes(2, &origin{even: true}), unknownBytes(2, &origin{even: true})),
	}
	if related {
		c.state = expr.CtStateBitRELATED
		c.status |= statusExpected
		if !subnet.Addr().IsPrivate() || subnet.Addr().Is6() {
			c.knownStatus &^= statusDstNAT // it may be routed
		}
	}
	if subnet.Addr().Is6() {
		c.family = unix.NFPROTO_IPV6
		c.network = slices.Concat(unknownBytes(6, nil), knownBytes([]byte{unix.IPPROTO_UDP}), unknownBytes(1, nil),
			outOf(subnets, 16), inPrefix(subnet))
		c.network[0] = cell{val: 6 << 4, known: 0xf0, mask: 0xff}
	} else {
		// Conntrack has reassembled fragments.
		c.network = slices.Concat(unknownBytes(9, nil), knownBytes([]byte{unix.IPPROTO_UDP}), unknownBytes(2, nil),
			outOf(subnets, 4), inPrefix(subnet))
		c.network[0] = cell{val: 4 << 4, known: 0xf0, mask: 0xff}
		c.network[6] = cell{known: 0xbf, mask: 0xff}
		c.network[7] = cell{known: 0xff, mask: 0xff}
	}
	c.in = oneLink(in, nil)
	c.out = oneLink(out, outside)
	return c
}

// source is the part of the header that has the source address.
func (c *child) source() []cell {
	size := 4
	if c.family == unix.NFPROTO_IPV6 {
		size = 16
	}
	return c.network[len(c.network)-2*size:][:size]
}

// newStranger returns the first packet of a flow that nobody translates and no expectation
// admits, from one endpoint to another. The port of from is 0 for any.
func newStranger(in, out *Link, outside []Link, from, to netip.AddrPort) *child {
	host := netip.PrefixFrom(to.Addr(), to.Addr().BitLen())
	c := newChild(false, in, out, outside, host, []netip.Prefix{host})
	c.status, c.labelled = 0, false
	copy(c.source(), knownBytes(from.Addr().AsSlice()))
	copy(c.transport[2:], knownBytes(binary.BigEndian.AppendUint16(nil, to.Port())))
	if from.Port() != 0 {
		copy(c.transport, knownBytes(binary.BigEndian.AppendUint16(nil, from.Port())))
	}
	return c
}

// oneLink returns what is known of a link. If l is nil, the link is unknown, but none of
// not.
func oneLink(l *Link, not []Link) linkCells {
	if l != nil {
		return linkCells{knownBytes(nfnl.LinkKey(l.Name)), knownBytes(binary.NativeEndian.AppendUint32(nil, uint32(l.Index)))}
	}
	is := func(key func(Link) []byte) *origin {
		return &origin{other: func(low, high []byte) bool {
			return slices.Equal(low, high) && slices.ContainsFunc(not, func(l Link) bool {
				// iptables compares a name including its zero byte, and a pattern without
				// one.
				k := key(l)
				return slices.Equal(k, low) || slices.Contains(low, 0) && slices.Equal(k, filled(low, len(k), 0))
			})
		}}
	}
	return linkCells{
		unknownBytes(unix.IFNAMSIZ, is(func(l Link) []byte { return nfnl.LinkKey(l.Name) })),
		unknownBytes(4, is(func(l Link) []byte { return binary.NativeEndian.AppendUint32(nil, uint32(l.Index)) })),
	}
}

// load updates the registers with what a statement loads, as far as it is known. Other
// statements load nothing.
func (c *child) load(regs *cells, e expr.Any) {
	switch e := e.(type) {
	case *expr.Bitwise:
		regs.bitwise(e)
	case *expr.Meta:
		if !e.SourceRegister {
			regs.put(e.Register, c.meta(e.Key))
		}
	case *expr.Ct:
		if !e.SourceRegister {
			regs.put(e.Register, c.ct(e))
		}
	case *expr.Payload:
		if e.OperationType == expr.PayloadLoad {
			regs.put(e.DestRegister, c.payload(e))
		}
	case *expr.Fib:
		regs.put(e.Register, c.fib(e))
	case *expr.Immediate:
		regs.put(e.Register, knownBytes(e.Data))
	}
}

// meta returns what is known of the value of a meta key, which has at most 16 bytes.
func (c *child) meta(key expr.MetaKey) []cell {
	switch key {
	case expr.MetaKeyL4PROTO:
		return knownBytes([]byte{unix.IPPROTO_UDP})
	case expr.MetaKeyNFPROTO:
		return knownBytes([]byte{c.family})
	case expr.MetaKeyPROTOCOL:
		if c.family == unix.NFPROTO_IPV6 {
			return knownBytes(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IPV6))
		}
		return knownBytes(binary.BigEndian.AppendUint16(nil, unix.ETH_P_IP))
	case expr.MetaKeyIIFNAME:
		return c.in.name
	case expr.MetaKeyIIF:
		return c.in.index
	case expr.MetaKeyOIFNAME:
		return c.out.name
	case expr.MetaKeyOIF:
		return c.out.index
	case expr.MetaKeyPKTTYPE:
		return knownBytes([]byte{unix.PACKET_HOST}) // ip_forward drops others
	case expr.MetaKeyMARK:
		if c.mark != nil {
			return c.mark
		}
	}
	return unknownBytes(16, nil)
}

// ct returns what is known of the value of a conntrack key.
func (c *child) ct(e *expr.Ct) []cell {
	switch e.Key {
	case expr.CtKeySTATE:
		if c.untracked {
			return knownBytes(binary.NativeEndian.AppendUint32(nil, expr.CtStateBitINVALID))
		}
		return knownBytes(binary.NativeEndian.AppendUint32(nil, c.state))
	case expr.CtKeySTATUS:
		cells := knownBytes(binary.NativeEndian.AppendUint32(nil, c.status))
		for i, b := range binary.NativeEndian.AppendUint32(nil, c.knownStatus) {
			cells[i].known = b
		}
		return cells
	case expr.CtKeyLABELS:
		cells := unknownBytes(len(nfnl.ChildLabel), nil)
		for i, b := range nfnl.ChildLabel {
			if cells[i].known = b; c.labelled {
				cells[i].val = b
			}
		}
		return cells
	case expr.CtKeyDIRECTION:
		if c.answers {
			return knownBytes([]byte{expr.CtDirReply})
		}
		return knownBytes([]byte{expr.CtDirOriginal})
	case expr.CtKeyMARK:
		if c.flowMark != nil {
			return c.flowMark
		}
	case expr.CtKeyHELPER: // of the master
		if c.state != expr.CtStateBitRELATED {
			break
		}
		return unknownBytes(helperNameLen, &origin{other: func(low, high []byte) bool {
			return bytes.Equal(low, high) && !nfnl.MayAnchor(helperName(low))
		}})
	case expr.CtKeySRC, expr.CtKeySRCIP, expr.CtKeySRCIP6, expr.CtKeyPROTOSRC, expr.CtKeyPROTODST:
		if e.Direction != expr.CtDirOriginal || !c.begins() {
			break
		}
		switch e.Key {
		case expr.CtKeyPROTOSRC:
			return slices.Clone(c.sourcePort())
		case expr.CtKeyPROTODST:
			return slices.Clone(c.originalPort())
		}
		return append(slices.Clone(c.source()), knownBytes(make([]byte, 16-len(c.source())))...)
	case expr.CtKeyL3PROTOCOL:
		return knownBytes([]byte{c.family})
	case expr.CtKeyPROTOCOL:
		return knownBytes([]byte{unix.IPPROTO_UDP})
	}
	return unknownBytes(16, nil)
}

// begins reports whether the packet is the first one of its flow: the flow has the same source.
func (c *child) begins() bool {
	return !c.untracked && !c.answers && c.state != expr.CtStateBitESTABLISHED
}

// originalPort is the port that the flow began with as its destination, of one that begins.
func (c *child) originalPort() []cell {
	if c.hasStatus(statusDstNAT) == never {
		return c.destinationPort()
	}
	return unknownBytes(2, &origin{even: true})
}

const helperNameLen = 16 // NF_CT_HELPER_NAME_LEN

// helperName returns the name of a conntrack helper, up to the zero bytes behind it.
func helperName(b []byte) string {
	name, _, _ := bytes.Cut(b, []byte{0})
	return string(name)
}

// has reports whether the packet may have the conntrack key. A new flow has no master, so it has no
// helper: the kernel reads that of the master.
func (c *child) has(key expr.CtKey) bool {
	switch key {
	case expr.CtKeySTATE:
		return true
	case expr.CtKeyHELPER:
		return !c.untracked && c.state != expr.CtStateBitNEW
	}
	return !c.untracked
}

// payload returns what is known of a part of a header.
func (c *child) payload(e *expr.Payload) []cell {
	var header []cell
	switch e.Base {
	case expr.PayloadBaseNetworkHeader:
		header = c.network
	case expr.PayloadBaseTransportHeader:
		header = c.transport
	}
	from, n := uint64(e.Offset), int(min(e.Len, 64))
	if c.rewritten || from+uint64(n) > uint64(len(header)) {
		return unknownBytes(n, nil)
	}
	return slices.Clone(header[from:][:n])
}

// fib returns what is known of the result of a route lookup.
func (c *child) fib(e *expr.Fib) []cell {
	switch {
	case e.ResultADDRTYPE && e.FlagDADDR && !e.FlagOIF && !e.FlagMARK && !e.FlagPRESENT:
		// What is for an address of the gateway comes by the link that has it.
		if !e.FlagIIF || c.local == always {
			return c.destinationType()
		}
	case e.FlagSADDR && e.FlagPRESENT:
		// The way back to a peer is an outside link: else it has no permission. It passes
		// reverse-path filters.
		return knownBytes([]byte{1})
	case e.FlagSADDR && e.FlagIIF && e.ResultOIF:
		return c.in.index
	}
	return unknownBytes(16, nil)
}
