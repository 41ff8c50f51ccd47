package gateway

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// rtaNHID is RTA_NH_ID of linux/rtnetlink.h.
const rtaNHID = 30

// leastEnded is the shortest prefix of local and rejecting routes in Ended. A shorter one
// is for all kinds of addresses.
const leastEnded = 16

// A reader decodes the messages of rtnetlink's dumps.
type reader struct {
	Network
	// byNexthop are the routes for which the kernel names a nexthop object and no link, as
	// it does if net.ipv4.nexthop_compat_mode is 0.
	byNexthop []nexthopRoute
	nexthops  map[uint32][]int    // the links of a nexthop object
	groups    map[uint32][]uint32 // the members of a group of nexthop objects
}

type nexthopRoute struct {
	Route
	id uint32
}

// link decodes a struct ifinfomsg with attributes.
func (r *reader) link(b []byte) error {
	var l Link
	err := attributes(b, unix.SizeofIfInfomsg, func(typ uint16, v []byte) {
		switch typ {
		case unix.IFLA_IFNAME:
			l.Name = nfnl.Text(v)
		case unix.IFLA_LINK:
			l.Lower = linkIndex(v)
		case unix.IFLA_LINK_NETNSID:
			l.Elsewhere = true
		case unix.IFLA_MASTER:
			l.Master = linkIndex(v)
		case unix.IFLA_LINKINFO:
			var data []byte
			nfnl.Attributes(v, func(typ uint16, v []byte) {
				switch typ {
				case unix.IFLA_INFO_KIND:
					l.Kind = nfnl.Text(v)
				case unix.IFLA_INFO_DATA:
					data = v
				}
			})
			if l.Kind == "bridge" {
				nfnl.Attributes(data, func(typ uint16, v []byte) {
					l.VLANs = l.VLANs || typ == unix.IFLA_BR_VLAN_FILTERING && octet(v) != 0
				})
			}
		}
	})
	if err != nil {
		return err
	}
	l.Index = int(int32(binary.NativeEndian.Uint32(b[4:])))
	l.Flags = binary.NativeEndian.Uint32(b[8:])
	r.Links = append(r.Links, l)
	return nil
}

// addr decodes a struct ifaddrmsg with attributes.
func (r *reader) addr(b []byte) error {
	var local, address netip.Addr
	err := attributes(b, unix.SizeofIfAddrmsg, func(typ uint16, v []byte) {
		switch typ {
		case unix.IFA_LOCAL:
			local, _ = netip.AddrFromSlice(v)
		case unix.IFA_ADDRESS:
			address, _ = netip.AddrFromSlice(v)
		}
	})
	if err != nil {
		return err
	}
	bits := int(b[1])
	switch {
	case !local.IsValid():
		local = address // IPv6 sends IFA_ADDRESS only
	case address.IsValid() && address != local:
		bits = local.BitLen() // point to point: the prefix is the other end's
	}
	p := netip.PrefixFrom(local, bits)
	if !p.IsValid() {
		return nil // another address family
	}
	r.Addrs = append(r.Addrs, Addr{
		Prefix: p, Link: int(int32(binary.NativeEndian.Uint32(b[4:]))), Leased: b[2]&unix.IFA_F_PERMANENT == 0,
		Narrow: b[3] != unix.RT_SCOPE_UNIVERSE || local.Is4() && b[2]&unix.IFA_F_SECONDARY != 0,
		Alone:  int(b[1]) == local.BitLen() && local == address,
	})
	return nil
}

// route decodes a struct rtmsg with attributes.
func (r *reader) route(b []byte) error {
	var (
		dst   netip.Addr
		table uint32
		links []int
		id    uint32
	)
	var bad error
	err := attributes(b, unix.SizeofRtMsg, func(typ uint16, v []byte) {
		switch typ {
		case unix.RTA_DST:
			dst, _ = netip.AddrFromSlice(v)
		case unix.RTA_TABLE:
			table = word(v)
		case unix.RTA_OIF:
			links = append(links, linkIndex(v))
		case unix.RTA_MULTIPATH:
			links, bad = multipath(v)
		case rtaNHID:
			id = word(v)
		}
	})
	if err = cmp.Or(err, bad); err != nil {
		return err
	}
	family, bits, typ := b[0], int(b[1]), b[7]
	// A cloned route is a cached one: a path MTU, a redirect.
	cloned := binary.NativeEndian.Uint32(b[8:])&unix.RTM_F_CLONED != 0
	switch p := netip.PrefixFrom(dst, bits); typ {
	case unix.RTN_LOCAL, unix.RTN_BLACKHOLE, unix.RTN_UNREACHABLE, unix.RTN_PROHIBIT:
		// A route for all addresses, or a wide one, says nothing about a single address.
		if family == unix.AF_INET && p.IsValid() && bits >= leastEnded && !dst.IsLoopback() {
			r.Ended = append(r.Ended, p)
		}
	}
	if typ != unix.RTN_UNICAST || table == unix.RT_TABLE_LOCAL || cloned {
		return nil
	}
	if tos := b[3]; family == unix.AF_INET && tos != 0 && !slices.Contains(r.routeTOS, tos) {
		r.routeTOS = append(r.routeTOS, tos)
	}
	if !dst.IsValid() {
		switch family {
		case unix.AF_INET:
			dst = netip.IPv4Unspecified()
		case unix.AF_INET6:
			dst = netip.IPv6Unspecified()
		}
	}
	p := netip.PrefixFrom(dst, bits)
	if !p.IsValid() || family != unix.AF_INET && family != unix.AF_INET6 {
		return nil
	}
	route := Route{Prefix: p, Table: table, Shared: len(links) > 1}
	for _, route.Link = range links {
		r.Routes = append(r.Routes, route)
	}
	if len(links) == 0 && id != 0 {
		r.byNexthop = append(r.byNexthop, nexthopRoute{route, id})
	}
	return nil
}

// multipath decodes a list of struct rtnexthop.
func multipath(b []byte) (links []int, err error) {
	for len(b) >= unix.SizeofRtNexthop {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofRtNexthop || n > len(b) {
			return nil, nfnl.ErrMalformed
		}
		links = append(links, int(int32(binary.NativeEndian.Uint32(b[4:]))))
		b = b[min((n+3)&^3, len(b)):]
	}
	return links, nil
}

// nexthop decodes a struct nhmsg with attributes.
func (r *reader) nexthop(b []byte) error {
	var (
		id      uint32
		links   []int
		members []uint32
	)
	err := attributes(b, unix.SizeofNhmsg, func(typ uint16, v []byte) {
		switch typ {
		case unix.NHA_ID:
			id = word(v)
		case unix.NHA_OIF:
			links = append(links, linkIndex(v))
		case unix.NHA_GROUP: // of struct nexthop_grp
			for b := v; len(b) >= 8; b = b[8:] {
				members = append(members, binary.NativeEndian.Uint32(b))
			}
		}
	})
	if err != nil {
		return err
	}
	if r.nexthops == nil {
		r.nexthops, r.groups = map[uint32][]int{}, map[uint32][]uint32{}
	}
	r.nexthops[id], r.groups[id] = links, members
	return nil
}

// resolve adds the routes by nexthop object. A group contains no groups.
func (r *reader) resolve() {
	r.viaObjects = len(r.byNexthop) > 0
	for _, by := range r.byNexthop {
		by.Shared = len(r.groups[by.id]) > 1
		for _, id := range append([]uint32{by.id}, r.groups[by.id]...) {
			for _, by.Link = range r.nexthops[id] {
				r.Routes = append(r.Routes, by.Route)
			}
		}
	}
}
