package userrules

import (
	"encoding/binary"
	"errors"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Of the kernel's linux/netfilter/ipset/ip_set.h.
const (
	ipsetProtocol = 7 // IPSET_PROTOCOL, Linux 4.20

	ipsetTest    = 11 // IPSET_CMD_
	ipsetHeader  = 12
	ipsetByIndex = 15

	ipsetVersion = 1 // IPSET_ATTR_
	ipsetName    = 2
	ipsetType    = 3
	ipsetData    = 7
	ipsetIndex   = 11

	ipsetAddr      = 1 // IPSET_ATTR_ of an element
	ipsetPort      = 4
	ipsetTransport = 7
	ipsetAddr2     = 20
	ipsetIPv4      = 1 // IPSET_ATTR_IPADDR_

	ipsetLacks      unix.Errno = 4103 // IPSET_ERR_EXIST
	ipsetOutOfRange unix.Errno = 4352 // IPSET_ERR_BITMAP_RANGE
)

// An ipset is a set of the program ipset.
type ipset struct {
	name  string
	parts []string // of its elements: "ip", "net", "port" and others
}

// matches returns the outcome of a match of iptables for a packet over IPv4 and a set of ipset. known is
// false if nobody can tell.
func (m *Members) matches(match *expr.Match, c *child) (matches, known bool) {
	// struct xt_set_info: the index of the set, how many parts the rule names, and flags. Bit 0 of these
	// inverts, and each further one says that a part is of the packet's source. Behind it are conditions
	// on counters, zero if there are none.
	const index, dim, inverts, rest = 0, 2, 3, 4
	info, _ := match.Info.(*xt.Unknown)
	if info == nil || match.Rev == 0 || len(*info) < rest || !allZero((*info)[rest:]) {
		return false, false
	}
	set := m.ipset(binary.NativeEndian.Uint16((*info)[index:]))
	flags := (*info)[inverts]
	if len(set.parts) > int((*info)[dim]) { // no packet is in it then: ip_set_test
		return flags&1 != 0, true
	}
	has, known := m.has(set, c, func(part int) bool { return flags&(2<<part) != 0 })
	return has != (flags&1 != 0), known
}

// ipset returns the set with an index, without parts if nobody can tell what it is.
func (m *Members) ipset(index uint16) (s ipset) {
	if s, ok := m.ipsets[index]; ok {
		return s
	}
	read := func(_ uint16, body []byte) {
		nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
			switch typ {
			case ipsetName:
				s.name = nfnl.Text(b)
			case ipsetType: // such as hash:ip,port
				_, parts, _ := strings.Cut(nfnl.Text(b), ":")
				s.parts = strings.Split(parts, ",")
			}
		})
	}
	err := m.askIPSet(ipsetByIndex, func(e *nfnl.Encoder) { e.BE16(ipsetIndex|unix.NLA_F_NET_BYTEORDER, index) }, read)
	if err == nil {
		err = m.askIPSet(ipsetHeader, func(e *nfnl.Encoder) { e.Str(ipsetName, s.name) }, read)
	}
	if err != nil {
		s = ipset{}
	}
	if m.ipsets == nil {
		m.ipsets = make(map[uint16]ipset)
	}
	m.ipsets[index] = s
	return s
}

// has asks the kernel whether a set has a packet. ofSource tells for each part whether it is of the
// packet's source or of its destination.
func (m *Members) has(s ipset, c *child, ofSource func(part int) bool) (has, known bool) {
	if len(s.parts) == 0 || c.rewritten {
		return false, false
	}
	understood := true
	err := m.askIPSet(ipsetTest, func(e *nfnl.Encoder) {
		e.Str(ipsetName, s.name)
		data, addrs := e.Nest(ipsetData), []uint16{ipsetAddr, ipsetAddr2}
		for i, part := range s.parts {
			host, port := c.network[c.destination():], c.destinationPort()
			if ofSource(i) {
				host, port = c.source(), c.sourcePort()
			}
			switch {
			case (part == "ip" || part == "net") && len(addrs) > 0:
				at := e.Nest(addrs[0])
				understood = putKnown(e, ipsetIPv4, host) && understood
				e.EndNest(at)
				addrs = addrs[1:]
			case part == "port":
				understood = putKnown(e, ipsetPort, port) && understood
				if len(s.parts) > 1 { // a set of ports alone has no protocol
					e.U8(ipsetTransport, unix.IPPROTO_UDP)
				}
			default:
				understood = false
			}
		}
		e.EndNest(data)
	}, nil)
	lacks := errors.Is(err, ipsetLacks) || errors.Is(err, ipsetOutOfRange)
	return err == nil, understood && (err == nil || lacks)
}

// putKnown appends cells as an attribute, and reports whether all of them are known.
func putKnown(e *nfnl.Encoder, typ uint16, cells []cell) bool {
	b := make([]byte, len(cells))
	for i, c := range cells {
		b[i] = c.val
	}
	e.Bytes(typ|unix.NLA_F_NET_BYTEORDER, b)
	return !slices.ContainsFunc(cells, func(c cell) bool { return c.known != 0xff })
}

// askIPSet sends one request to ipset. A refusal is a unix.Errno; other errors are noted.
func (m *Members) askIPSet(cmd uint16, put func(e *nfnl.Encoder), answer func(typ uint16, body []byte)) error {
	if !m.dial() {
		return m.err
	}
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_IPSET, cmd, unix.NLM_F_REQUEST, m.c.NextSeq(1), unix.AF_INET)
	e.U8(ipsetVersion, ipsetProtocol)
	put(&e)
	e.End()
	err := m.c.Ask(&e, answer)
	if _, refused := errors.AsType[unix.Errno](err); !refused {
		m.fails(err)
	}
	return err
}
