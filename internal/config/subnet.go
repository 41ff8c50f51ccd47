package config

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// notUnicast has the prefixes that no subnet may overlap, with the RFC that defines each.
var notUnicast = []struct {
	prefix netip.Prefix
	name   string
}{
	{netip.MustParsePrefix("0.0.0.0/8"), "this network, RFC 1122"},
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback, RFC 1122"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local, RFC 3927"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast, RFC 5771"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast, RFC 919"},
	{netip.MustParsePrefix("::/128"), "unspecified, RFC 4291"},
	{netip.MustParsePrefix("::1/128"), "loopback, RFC 4291"},
	{netip.MustParsePrefix("fe80::/10"), "link-local, RFC 4291"},
	{netip.MustParsePrefix("ff00::/8"), "multicast, RFC 4291"},
}

// subnetList collects subnets from one source, the file or the flags.
type subnetList struct {
	auto   bool
	routed bool // auto is
	list   []Subnet
	links  []LinkSubnet

	// Where auto and each of list and links were given.
	autoAt          string
	listAt, linksAt []string
}

// set stores the collected subnets in c.
func (l *subnetList) set(c *Config) {
	c.AutoSubnets, c.AutoRouted, c.Subnets, c.LinkSubnets = l.auto, l.routed, l.list, l.links
}

// namesLink reports whether a value is the name of a link, rather than an address or a part
// of one.
func namesLink(v any) bool {
	s, err := link(v)
	return err == nil && strings.Trim(s, "0123456789.-") != ""
}

// add checks one more subnet and adds it with the other settings of s. v is a value as TOML
// decodes it: a prefix, the name of a link, or "auto". The subnet must not overlap an
// earlier one. An error is about the returned key.
func (l *subnetList) add(at string, v any, s Subnet) (key string, err error) {
	if v == "auto" {
		if key := s.firstSet(); key != "" {
			return "prefix", expected("a prefix beside "+key+": which networks it is for should not be guessed", v)
		}
		l.auto, l.routed, l.autoAt = true, s.Routed, at
		return "prefix", nil
	}
	if s.Routed && s.Filtering == EndpointIndependent {
		return "filtering", fmt.Errorf("%s is routed, and endpoint_independent filtering is for source NAT: "+
			"an expectation for everybody would let other inside networks in", literal(v))
	}
	if s.PortPool != "" && s.Mapping != EndpointIndependentMapping {
		return "port_pool", fmt.Errorf(`%s has a port_pool, which is for mapping = "endpoint_independent": add that, or take the port_pool out`, literal(v))
	}
	if namesLink(v) {
		name, _ := v.(string)
		if slices.ContainsFunc(l.links, func(x LinkSubnet) bool { return x.Link == name }) {
			return "prefix", fmt.Errorf("%w; keep one of the two", expected("each link once", v))
		}
		l.links = append(l.links, LinkSubnet{Link: name, Like: s})
		l.linksAt = append(l.linksAt, at)
		return "prefix", nil
	}
	return "prefix", l.addPrefix(at, v, s)
}

// firstSet returns a key that "auto" does not allow, if s has one.
func (s Subnet) firstSet() string {
	s.Routed = false
	for _, k := range subnetKeys {
		if k.get(&s) != k.initial() {
			return k.Name
		}
	}
	return ""
}

// addPrefix is add for a prefix.
func (l *subnetList) addPrefix(at string, v any, s Subnet) error {
	p, err := subnetPrefix(v)
	if err != nil {
		return err
	}
	for _, n := range notUnicast {
		if p.Overlaps(n.prefix) {
			return fmt.Errorf("%w, which overlaps %q (%s)", expected("a unicast prefix", v), n.prefix, n.name)
		}
	}
	for i, other := range l.list {
		if !p.Overlaps(other.Prefix) {
			continue
		}
		how := "equal to"
		switch {
		case p.Bits() > other.Prefix.Bits():
			how = "inside"
		case p.Bits() < other.Prefix.Bits():
			how = "around"
		}
		return fmt.Errorf("%w %s %q of %s; a host belongs to one subnet, so keep one of the two",
			expected("subnets that do not overlap", v), how, other.Prefix, l.listAt[i])
	}
	if p.Addr().Is6() && s.Mapping != "" {
		return fmt.Errorf("%w; mapping is about IPv4 addresses that are translated", expected("an IPv4 prefix beside mapping", v))
	}
	s.Prefix = p
	l.list = append(l.list, s)
	l.listAt = append(l.listAt, at)
	return nil
}

// Uncarried says what of the configuration the chosen backend cannot give, in one sentence; it is
// empty if it can give all, as far as the configuration tells. conenatd starts all the same.
func (c *Config) Uncarried() string {
	subnets := slices.Clone(c.Subnets)
	names := make([]string, 0, len(subnets))
	for _, s := range subnets {
		names = append(names, s.Prefix.String())
	}
	for _, l := range c.LinkSubnets {
		subnets, names = append(subnets, l.Like), append(names, l.Link)
	}
	for i, s := range subnets {
		six := s.Prefix.IsValid() && s.Prefix.Addr().Is6()
		switch {
		case c.Backend == BackendExpect && s.Filtering == EndpointIndependent:
			return fmt.Sprintf(`with backend = "expect" the subnet %s gets address_dependent filtering: set backend = "auto", for only the map admits everybody`, names[i])
		case c.Backend != BackendNFT || s.Filtering == AddressAndPortDependent:
		case six:
			return fmt.Sprintf(`with backend = "nft" the subnet %s gets no permission: set backend = "auto", for only expectations carry IPv6`, names[i])
		case s.Routed:
			return fmt.Sprintf(`with backend = "nft" the untranslated flows of %s give no permission: set backend = "auto", for only expectations carry these`, names[i])
		}
	}
	return ""
}
