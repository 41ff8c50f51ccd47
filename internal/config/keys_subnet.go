package config

import "net/netip"

// subnetKeys are the keys of a [[subnet]] table.
var subnetKeys = []setting[Subnet]{
	{
		Key: Key{
			Name: "prefix", Flag: "subnet", Kind: "prefix",
			Usage: `inside prefix to enable, a link for its prefixes, or "auto", instead of those of the file (repeatable)`,
			Doc: `The inside prefix to enable. "lan0" enables the prefixes that are connected to that link, as
they come and go; the IPv6 ones only if routed is true. "auto" enables the private IPv4
prefixes on links that do not lead outside, as they come and go, and if routed is true all IPv6
prefixes on these links that no outside link has. A link leads outside if it has or had a
default route, if outside names it, if it has an IPv4 address from DHCP, or if a source NAT rule
of yours translates by it, unlike by other links. While no link is known to lead outside, "auto"
enables nothing. Neither enables link-local prefixes.`,
		},
		// Which prefixes go together is known to subnetList.add alone.
		access: one(subnetPrefix, func(s *Subnet) *netip.Prefix { return &s.Prefix }),
	},
	{
		Key: Key{
			Name: "routed", Flag: "routed", Kind: "bool",
			Usage: "the subnets of --subnet are routed, not only NATed",
			Doc:   `Flows without source NAT count, too (routed IPv4, and normally IPv6).`,
		},
		access: one(boolean, func(s *Subnet) *bool { return &s.Routed }),
	},
	{
		Key: Key{
			Name: "filtering", Flag: "filtering", Kind: "word",
			Usage: "who may send to the hosts of --subnet: address_dependent, endpoint_independent (anybody) or address_and_port_dependent (no permissions)",
			Doc: `Who may send to a port that a host of the subnet uses: "address_dependent", the peers that it
has sent to, from any port; "address_and_port_dependent", only what the kernel itself lets in
(no permissions); or "endpoint_independent", anybody on the Internet (a full cone). Behind
source NAT the last one needs the nft backend, a forward chain of yours that accepts
'ct status dnat', and a firewall on the host.`,
		},
		access: word(func(s *Subnet) *Filtering { return &s.Filtering }, AddressDependent, EndpointIndependent, AddressAndPortDependent),
	},
	{
		Key: Key{
			Name: "mapping", Flag: "mapping", Kind: "word",
			Usage: "how the hosts of --subnet get their outside ports: kernel, or endpoint_independent (one outside port for each inside port, shared with no other)",
			Doc: `How the hosts get their outside ports: "kernel", whatever its NAT finds free; or
"endpoint_independent": one outside port for each inside port, towards all peers and shared
with no other endpoint (RFC 4787 REQ-1, REQ-3). IPv4 behind source NAT; needs nftables.`,
		},
		access: word(func(s *Subnet) *Mapping { return &s.Mapping }, KernelMapping, EndpointIndependentMapping),
	},
	{
		Key: Key{
			Name: "port_pool", Kind: "ports",
			Doc: `With endpoint_independent mapping: a port_pool for these hosts alone. The empty string means
the one outside the table.`,
		},
		access: one(ownPool, func(s *Subnet) *PortPool { return &s.PortPool }).orWords("none", ""),
	},
}

// ownPool accepts what portPool accepts, and "" for none of its own.
func ownPool(v any) (PortPool, error) {
	if v == "" {
		return "", nil
	}
	return portPool(v)
}

func subnetPrefix(v any) (netip.Prefix, error) {
	return prefix(`a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto"`, v)
}
