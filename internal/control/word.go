package control

import (
	"fmt"
	"net/netip"
	"strings"
)

// A Word selects permissions for a revoke: by the addresses that Addrs contains, or by an
// inside or outside endpoint.
type Word struct {
	Addrs    netip.Prefix // of an inside host, of the outside or of a peer; invalid for an endpoint
	Endpoint netip.AddrPort
}

// String returns the word as the user may have written it.
func (w Word) String() string {
	switch {
	case !w.Addrs.IsValid():
		return w.Endpoint.String()
	case w.Addrs.IsSingleIP():
		return w.Addrs.Addr().String()
	}
	return w.Addrs.String()
}

// MarshalText is String, for logs.
func (w Word) MarshalText() ([]byte, error) { return []byte(w.String()), nil }

// ParseWord parses an address, a prefix or an endpoint.
func ParseWord(text string) (Word, error) {
	if e, ok := parseEndpoint(text); ok {
		return Word{Endpoint: e}, nil
	}
	p, err := parseAddrs("revoke", text, "an endpoint such as 198.51.100.1:5060")
	return Word{Addrs: p}, err
}

// parseAddr parses an address. Permissions have no zone, and no IPv4 address in IPv6 (RFC 4291).
func parseAddr(text string) (netip.Addr, bool) {
	a, err := netip.ParseAddr(text)
	return a.Unmap(), err == nil && a.Zone() == ""
}

// parseEndpoint parses an address and a port that is not 0.
func parseEndpoint(text string) (netip.AddrPort, bool) {
	e, err := netip.ParseAddrPort(text)
	return netip.AddrPortFrom(e.Addr().Unmap(), e.Port()), err == nil && e.Port() != 0 && e.Addr().Zone() == ""
}

// parseAddrs parses an address or a prefix. Errors begin with what; or says what else was possible.
func parseAddrs(what, text, or string) (netip.Prefix, error) {
	if a, ok := parseAddr(text); ok {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		kinds := []string{"an address such as 192.0.2.1", "a prefix such as 192.0.2.0/24"}
		if or != "" {
			kinds = append(kinds, or)
		}
		kinds[len(kinds)-1] = "or " + kinds[len(kinds)-1]
		return netip.Prefix{}, fmt.Errorf("%s %q: expected %s", what, text, strings.Join(kinds, ", "))
	case p != p.Masked():
		return netip.Prefix{}, fmt.Errorf("%s %q: expected a prefix without host bits; did you mean %v, or %v?", what, text, p.Masked(), p.Addr())
	}
	return p, nil
}
