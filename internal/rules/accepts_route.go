//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// queryTimeout bounds every wait for an answer of the kernel. It answers at once, so this is
// only met when something is badly wrong.
const queryTimeout = 5 * time.Second

// insideLinks returns the link that leads to each of the subnets, nil where there
// is none or more than one, or one that is outside. More specific routes within a
// subnet, and routing rules by mark or incoming link, are not seen.
func insideLinks(netns int, outside []Link, subnets []netip.Prefix) ([]*Link, error) {
	nl, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("dial rtnetlink: %w", err)
	}
	defer func() { _ = nl.Close() }()
	if err := nl.SetDeadline(time.Now().Add(queryTimeout)); err != nil {
		return nil, err
	}
	links := make([]*Link, len(subnets))
	for i, subnet := range subnets {
		index, err := routeTo(nl, subnet)
		if err != nil {
			return nil, fmt.Errorf("look up the route to %s: %w", subnet, err)
		}
		if index == 0 || slices.ContainsFunc(outside, func(l Link) bool { return l.Index == index }) {
			continue
		}
		name, err := nameOf(nl, index)
		if err != nil {
			return nil, fmt.Errorf("read the name of link %d: %w", index, err)
		}
		if name != "" {
			links[i] = &Link{index, name}
		}
	}
	return links, nil
}

// routeTo returns the index of the link to some hosts of a subnet, 0 when they have
// none in common.
func routeTo(nl *netlink.Conn, subnet netip.Prefix) (int, error) {
	found := 0
	for _, host := range someHosts(subnet) {
		index, err := linkTo(nl, host)
		switch {
		case err != nil:
			return 0, err
		case index == ownAddress:
		case index == 0, found != 0 && found != index:
			return 0, nil
		default:
			found = index
		}
	}
	return found, nil
}

// someHosts returns the first two and the last two hosts of a subnet.
func someHosts(subnet netip.Prefix) []netip.Addr {
	first := subnet.Masked().Addr()
	b := first.AsSlice()
	for i := subnet.Bits(); i < first.BitLen(); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	last, _ := netip.AddrFromSlice(b)
	if first.BitLen()-subnet.Bits() < 3 {
		return []netip.Addr{first, last}
	}
	return []netip.Addr{first.Next(), first.Next().Next(), last.Prev().Prev(), last.Prev()}
}

// ownAddress stands for the route to an address of the gateway itself.
const ownAddress = -1

// linkTo returns the link to a host, 0 where there is no route.
func linkTo(nl *netlink.Conn, host netip.Addr) (int, error) {
	request := make([]byte, unix.SizeofRtMsg)
	request[0], request[1] = unix.AF_INET, byte(host.BitLen())
	if host.Is6() {
		request[0] = unix.AF_INET6
	}
	dst, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.RTA_DST, Data: host.AsSlice()}})
	if err != nil {
		return 0, err
	}
	answers, err := nl.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETROUTE, Flags: netlink.Request},
		Data:   append(request, dst...),
	})
	switch {
	case errors.Is(err, unix.ENETUNREACH), errors.Is(err, unix.EHOSTUNREACH), errors.Is(err, unix.EACCES),
		errors.Is(err, unix.EINVAL), errors.Is(err, unix.EAFNOSUPPORT), errors.Is(err, unix.EOPNOTSUPP):
		return 0, nil // no route, or one of type prohibit or blackhole, or no IPv6
	case err != nil:
		return 0, err
	case len(answers) != 1 || len(answers[0].Data) < unix.SizeofRtMsg:
		return 0, fmt.Errorf("%d answers", len(answers))
	}
	index := 0
	switch answer := answers[0].Data; answer[7] {
	case unix.RTN_LOCAL:
		return ownAddress, nil
	case unix.RTN_UNICAST:
		nfnl.Attributes(answer[unix.SizeofRtMsg:], func(typ uint16, b []byte) {
			if typ == unix.RTA_OIF && len(b) == 4 {
				index = int(binary.NativeEndian.Uint32(b))
			}
		})
	}
	return index, nil
}

// nameOf returns the name of a link, or nothing when it is gone.
func nameOf(nl *netlink.Conn, index int) (string, error) {
	request := make([]byte, unix.SizeofIfInfomsg)
	binary.NativeEndian.PutUint32(request[4:], uint32(index))
	answers, err := nl.Execute(netlink.Message{
		Header: netlink.Header{Type: unix.RTM_GETLINK, Flags: netlink.Request},
		Data:   request,
	})
	if errors.Is(err, unix.ENODEV) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	name := ""
	for _, m := range answers {
		if len(m.Data) < unix.SizeofIfInfomsg {
			continue
		}
		nfnl.Attributes(m.Data[unix.SizeofIfInfomsg:], func(typ uint16, b []byte) {
			if typ == unix.IFLA_IFNAME {
				name = text(b)
			}
		})
	}
	return name, nil
}
