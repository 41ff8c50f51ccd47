package cone

import (
	"net/netip"
	"time"
)

// An Addr is an IPv4 or IPv6 address, IPv4 in its IPv4-mapped form. It holds
// no pointer, so that a million of them cost the garbage collector nothing.
// The zero value is the IPv6 address "::".
type Addr [16]byte

// AddrFrom packs a. IPv4 and IPv4-mapped IPv6 addresses become equal; a zone
// is dropped.
func AddrFrom(a netip.Addr) Addr { return a.As16() }

// AddrFrom4 packs an IPv4 address.
func AddrFrom4(b [4]byte) Addr {
	return Addr{10: 0xff, 11: 0xff, 12: b[0], 13: b[1], 14: b[2], 15: b[3]}
}

// Is4 reports whether a is an IPv4 address.
func (a Addr) Is4() bool {
	return [12]byte(a[:12]) == [12]byte{10: 0xff, 11: 0xff}
}

// Netip returns a as a netip.Addr, IPv4 unmapped.
func (a Addr) Netip() netip.Addr { return netip.AddrFrom16(a).Unmap() }

// WithoutLow returns a with its n low bits cleared.
func (a Addr) WithoutLow(n uint8) Addr {
	for i := len(a) - 1; n > 0; i-- {
		low := min(n, 8)
		a[i] &^= 1<<low - 1
		n -= low
	}
	return a
}

// Plus returns the address n after a. The last byte must have room for the sum.
func (a Addr) Plus(n int) Addr {
	a[len(a)-1] += byte(n)
	return a
}

func (a Addr) String() string { return a.Netip().String() }

// An Endpoint is an address and a UDP port.
type Endpoint struct {
	Addr Addr
	Port uint16
}

// EndpointFrom packs ap.
func EndpointFrom(ap netip.AddrPort) Endpoint {
	return Endpoint{Addr: AddrFrom(ap.Addr()), Port: ap.Port()}
}

// Netip returns e as a netip.AddrPort.
func (e Endpoint) Netip() netip.AddrPort {
	return netip.AddrPortFrom(e.Addr.Netip(), e.Port)
}

func (e Endpoint) String() string { return e.Netip().String() }

// A Status is the status word of a conntrack entry (enum ip_conntrack_status).
type Status uint32

// The bits of Status that conenatd uses.
const (
	StatusExpected  Status = 1 << 0  // admitted by an expectation
	StatusSeenReply Status = 1 << 1  // packets seen in both directions
	StatusAssured   Status = 1 << 2  // never dropped early
	StatusConfirmed Status = 1 << 3  // in the table
	StatusSrcNAT    Status = 1 << 4  // source of the original direction changed
	StatusDstNAT    Status = 1 << 5  // destination of the original direction changed
	StatusOffload   Status = 1 << 14 // in a flowtable: counters and timeout are not updated
	StatusHWOffload Status = 1 << 15 // in the flowtable of a network card, beside StatusOffload
)

// Has reports whether all bits of t are set in s.
func (s Status) Has(t Status) bool { return s&t == t }

// A Flow is one UDP conntrack entry, as an event or a dump reports it.
type Flow struct {
	// ID is the kernel's identifier (CTA_ID). It is a hash: unique enough together with the
	// tuple, not alone.
	ID     uint32
	Mark   uint32
	Status Status

	// OrigZone and ReplyZone are the conntrack zones of the two directions.
	// They are equal unless a zone was given to one direction only.
	OrigZone, ReplyZone uint16

	// Src and Dst are the original direction as the first packet arrived,
	// ReplySrc and ReplyDst the reply direction as the answer arrives.
	// For an outbound flow behind source NAT, Src is the inside endpoint and
	// ReplyDst the outside endpoint of its mapping.
	Src, Dst           Endpoint
	ReplySrc, ReplyDst Endpoint

	// MasterSrc and MasterDst are the original direction of the master of an
	// expected flow; both zero for a flow that was not expected.
	MasterSrc, MasterDst Endpoint

	// Labelled says that a rule of ours admitted the flow, and marked it.
	Labelled bool

	// Helped says that a conntrack helper works on the flow.
	Helped bool

	// OrigPackets and ReplyPackets are valid if HasCounters is set: the kernel counts
	// packets (nf_conntrack_acct) and the message carried the counters.
	OrigPackets, ReplyPackets uint64
	HasCounters               bool

	// Began says that the message is the kernel's report of the flow's first packet.
	Began bool

	// Left is how long the kernel would keep the flow without another packet, rounded down
	// to seconds; zero if the flow has ended.
	Left time.Duration

	// Late is the greatest possible age of this information about the flow.
	Late time.Duration
}

// IsChild reports whether f shows that a permission admitted it: by our mark on what the map
// admitted, which kernels without conntrack labels lack, or by its master.
func (f *Flow) IsChild() bool {
	if f.Status.Has(StatusExpected) {
		return IsAnchor(f.MasterSrc, f.MasterDst)
	}
	return f.Labelled && f.Status.Has(StatusDstNAT)
}

// Turned returns f with its directions exchanged: a child as if the inside host had opened it.
func (f *Flow) Turned() Flow {
	t := *f
	t.Src, t.Dst, t.ReplySrc, t.ReplyDst = f.ReplySrc, f.ReplyDst, f.Src, f.Dst
	t.OrigZone, t.ReplyZone = f.ReplyZone, f.OrigZone
	t.OrigPackets, t.ReplyPackets = f.ReplyPackets, f.OrigPackets
	return t
}

// Timeouts are how long the kernel keeps a UDP flow after its last packet. Zero means
// unknown.
type Timeouts struct {
	UDP    time.Duration // nf_conntrack_udp_timeout
	Stream time.Duration // nf_conntrack_udp_timeout_stream, of assured flows
}

// A Key names a permission. The kernel knows at most one owner for it.
type Key struct {
	Ext  Endpoint // outside endpoint of the mapping
	Peer Addr     // who may send to it, from any port
	Zone uint16   // conntrack zone of the reply direction of its flows
	// HostBits is the number of low bits of Peer that match any value; they are zero in Peer.
	// It is above 0 if the peer is a group of addresses, or everybody.
	HostBits uint8
}

// Peers returns the addresses that may send.
func (k Key) Peers() netip.Prefix {
	a := k.Peer.Netip()
	return netip.PrefixFrom(a, a.BitLen()-int(k.HostBits))
}

// A Permission says that Peer may send to Ext, from any port, and reaches Int
// (RFC 8656 section 9 uses the word for just this). For a routed subnet, which
// is not translated, Ext equals Int.
type Permission struct {
	Key
	Int Endpoint
	// Mark is the connmark of the flow that the permission came from;
	// children inherit it, so that policy routing keeps working.
	Mark uint32
	// MapTranslates says that a map can carry the permission. Then the map alone says where
	// children go: an expectation makes them RELATED and translates nothing. It is for the Key,
	// whichever inside host has that.
	MapTranslates bool
}

// Routed reports whether the permission involves no address translation.
func (p Permission) Routed() bool { return p.Ext == p.Int }
