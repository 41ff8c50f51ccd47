package gateway

import (
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// LinksTo returns the link that leads to each of the subnets. A Link without a name means
// that there is no link, more than one, or one that n lacks. More specific routes within a
// subnet, and routing rules by mark or incoming link, are not seen. It asks the kernel of
// the network namespace behind the descriptor netns, or of the calling thread's own if that
// is 0.
func (n Network) LinksTo(netns int, subnets []netip.Prefix) (links []Link, err error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.Close() }()
	known := n.links()
	for _, subnet := range subnets {
		index, err := c.linkToAll(subnet)
		if err != nil {
			return nil, fmt.Errorf("look up the route to %s: %w", subnet, err)
		}
		links = append(links, known[index])
	}
	return links, nil
}

// linkToAll returns the index of the link to some hosts of a subnet, 0 if they do not share
// one.
func (c *conn) linkToAll(subnet netip.Prefix) (int, error) {
	found := 0
	for _, host := range someHosts(subnet) {
		index, err := c.linkTo(host)
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
	first, last := subnet.Masked().Addr(), cone.RangeOf(subnet).Last
	if first.BitLen()-subnet.Bits() < 3 {
		return []netip.Addr{first, last}
	}
	return []netip.Addr{first.Next(), first.Next().Next(), last.Prev().Prev(), last.Prev()}
}

// ownAddress stands for the route to an address of the gateway itself.
const ownAddress = -1

// forwarded is the user to whom the kernel routes packets that have no socket (sock_net_uid,
// ip6_route_input), for rules that select by user (ip rule uidrange). Without it the kernel answers
// for the user who asks.
const forwarded = 0

// linkTo returns the index of the link to a host, 0 if there is no route.
func (c *conn) linkTo(host netip.Addr) (index int, err error) {
	h := c.begin(unix.RTM_GETROUTE, 0, unix.SizeofRtMsg)
	if h[0], h[1] = unix.AF_INET, byte(host.BitLen()); host.Is6() {
		h[0] = unix.AF_INET6
	}
	c.enc.Bytes(unix.RTA_DST, host.AsSlice())
	c.enc.NE32(unix.RTA_UID, forwarded)
	return c.routeLink()
}

// routeLink asks for a route, and returns the index of the link that it leads to: ownAddress, or 0
// if the packet does not leave.
func (c *conn) routeLink() (index int, err error) {
	err = c.exchange(func(b []byte) error {
		if len(b) < unix.SizeofRtMsg {
			return nfnl.ErrMalformed
		}
		switch b[7] {
		case unix.RTN_LOCAL:
			index = ownAddress
		case unix.RTN_UNICAST:
			return attributes(b, unix.SizeofRtMsg, func(typ uint16, v []byte) {
				if typ == unix.RTA_OIF {
					index = linkIndex(v)
				}
			})
		}
		return nil
	})
	// No route, or a rejecting one, or no IPv6.
	for _, no := range []unix.Errno{
		unix.ENETUNREACH, unix.EHOSTUNREACH, unix.EACCES, unix.EINVAL, unix.EAGAIN, unix.EXDEV,
		unix.ENODEV, unix.ENETDOWN, unix.EAFNOSUPPORT, unix.EOPNOTSUPP,
	} {
		if errors.Is(err, no) {
			return 0, nil
		}
	}
	return index, err
}
