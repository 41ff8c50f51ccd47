package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// DefaultPort is the UDP port of STUN (RFC 8489 section 8.1).
const DefaultPort = 3478

// A Server is a STUN server as the user names it.
type Server struct {
	Host string // a name or an address, without brackets
	Port uint16
}

// ParseServer parses HOST, HOST:PORT, an IPv6 address, or [ADDRESS]:PORT.
func ParseServer(text string) (Server, error) {
	host, port, withPort := text, "", false
	if addr, err := netip.ParseAddr(text); err == nil {
		host = addr.String()
	} else if inner, ok := strings.CutPrefix(text, "["); ok && strings.HasSuffix(inner, "]") {
		host = strings.TrimSuffix(inner, "]")
	} else if strings.Contains(text, ":") {
		withPort = true
		if host, port, err = net.SplitHostPort(text); err != nil {
			return Server{}, fmt.Errorf("server %q: expected HOST, HOST:PORT or [ADDRESS]:PORT", text)
		}
	}
	if host == "" || strings.ContainsAny(host, " \t/@") {
		return Server{}, fmt.Errorf("server %q: expected HOST, HOST:PORT or [ADDRESS]:PORT", text)
	}
	s := Server{Host: host, Port: DefaultPort}
	if withPort {
		n, err := strconv.ParseUint(port, 10, 16)
		if err != nil || n == 0 {
			return Server{}, fmt.Errorf("server %q: expected a port from 1 to 65535 behind the colon", text)
		}
		s.Port = uint16(n)
	}
	if a, err := netip.ParseAddr(host); err == nil && (a.IsUnspecified() || a.IsMulticast()) {
		return Server{}, fmt.Errorf("server %q: expected the address of one host", text)
	}
	return s, nil
}

func (s Server) String() string { return net.JoinHostPort(s.Host, strconv.Itoa(int(s.Port))) }

// resolve returns an endpoint of the server for each address family that it has, IPv4 first.
// If from is valid, only that of its family.
func (s Server) resolve(ctx context.Context, from netip.Addr) (all []netip.AddrPort, err error) {
	found, err := net.DefaultResolver.LookupNetIP(ctx, "ip", s.Host)
	if err != nil {
		return nil, fmt.Errorf("find server %s: %w", s.Host, err)
	}
	for _, four := range []bool{true, false} {
		for _, a := range found {
			a = a.Unmap()
			if a.Is4() == four && (!from.IsValid() || from.Is4() == four) {
				all = append(all, netip.AddrPortFrom(a, s.Port))
				break
			}
		}
	}
	if len(all) == 0 {
		err = errors.New("it has no address")
		if from.IsValid() {
			err = fmt.Errorf("it has no address of the family of %v", from)
		}
		return nil, fmt.Errorf("find server %s: %w", s.Host, err)
	}
	return all, nil
}

// OwnAddress parses the address to send from, which must be one of this host.
func OwnAddress(text string) (netip.Addr, error) {
	from, err := netip.ParseAddr(text)
	if err != nil {
		return from, fmt.Errorf("from %q: expected an address of this host", text)
	}
	from = from.Unmap()
	own, err := ownAddresses()
	if err != nil {
		return from, err
	}
	if !slices.Contains(own, from.WithZone("")) {
		return from, fmt.Errorf("from %q: expected an address of this host, one of %v", text, own)
	}
	return from, nil
}

// ownAddresses lists the addresses of all links of this host.
func ownAddresses() (own []netip.Addr, err error) {
	all, err := net.InterfaceAddrs()
	if err != nil {
		return nil, fmt.Errorf("list own addresses: %w", err)
	}
	for _, a := range all {
		if p, err := netip.ParsePrefix(a.String()); err == nil {
			own = append(own, p.Addr().Unmap())
		}
	}
	return own, nil
}
