package config

import "net/netip"

// linkKeys are in the section "Links".
var linkKeys = []setting[Config]{
	{
		Key: Key{
			Name: "outside", Flag: "outside", Kind: "link", List: true,
			Usage: "outside link besides those that routes, rules and flows tell of (repeatable)",
			Doc: `Outside links, such as ["wan0"], in addition to those that conenatd finds: links by which a
default route leaves, links that a source NAT rule of yours identifies, and links by which a
translated flow left towards the Internet. A link may appear later, as ppp0 does at boot.`,
		},
		access: list(`["wan0"]`, link, func(c *Config) *[]string { return &c.Outside }),
	},
	{
		Key: Key{
			Name: "inside", Flag: "inside", Kind: "link", List: true,
			Usage: "link that is no outside link, whatever routes and rules say (repeatable)",
			Doc: `Links that are never outside links, such as ["lan0"], whatever routes and rules say. A
packet with a source in an enabled subnet that comes by such a link is from inside, even if
the way back to it is another link.`,
		},
		access: list(`["lan0"]`, link, func(c *Config) *[]string { return &c.Inside }),
	},
	{
		Key: Key{
			Name: "uplink_marks", Flag: "uplink-marks", Kind: "bool",
			Usage: "mark flows by the link of --outside that they leave or come by, for your rules of policy routing",
			Doc: `For gateways with several uplinks: mark the UDP flows of the subnets, in the connmark, with
the link of "outside" by which they leave or came, and put that mark on their packets from
inside before these are routed. Then a rule such as "ip rule add fwmark
0x01000000/0x0f000000 lookup 101" keeps a flow and its children on their uplink. The first
link of "outside" has the value 1 in the bits of uplink_mask, the second 2. No other bit
changes, and a mark of yours in these bits stays. docs/recipes/uplink-marks.md has the whole
set-up. Needs nftables.`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.UplinkMarks }),
	},
	{
		Key: Key{
			Name: "uplink_mask", Flag: "uplink-mask", Kind: "bits",
			Usage: "bits of the marks that tell the link: 1 in them is the first of --outside, 2 the second",
			Doc: `Bits of the mark that encode the link, side by side. In these bits the first link of
"outside" has the value 1, the second 2.`,
		},
		access: one(markBits, func(c *Config) *uint32 { return &c.UplinkMask }),
	},
}

// mappingKeys are in the section "Mapping".
var mappingKeys = []setting[Config]{
	{
		Key: Key{
			Name: "port_pool", Flag: "port-pool", Kind: "ports", List: true,
			Usage: "outside ports for hosts with endpoint-independent mapping whose own port another host has, or none (repeatable)",
			Doc: `For subnets with endpoint-independent mapping (see mapping of a subnet): the outside ports for hosts whose
own port another host already has. A range, several ranges such as ["7472-7487",
"11568-11583"], or "none". Ports that the gateway itself uses (net.ipv4.ip_local_port_range
without net.ipv4.ip_local_reserved_ports, sockets, forwards) are left out. If little of the
default pool remains, some of the other ports are used, and a warning names them. A host is
left to your source NAT rule instead if that rule chooses ports itself (a range, a map,
random), and always with "none". Set "none" if iptables-legacy has such a rule and conenatd
runs neither as root nor with its group: it cannot read the rule then. After a reload, mappings
on ports of the previous pool end with their flows.`,
		},
		access: one(portPool, func(c *Config) *PortPool { return &c.PortPool }).orWords("none"),
	},
	{
		Key: Key{
			Name: "mapping_exempt", Flag: "mapping-exempt", Kind: "prefix", List: true,
			Usage: "destinations outside towards which your rules do not source-NAT, such as a VPN's (repeatable)",
			Doc: `Outside destinations to which your rules do not apply source NAT, or give another source
than to others, because of a mark or a named set. Destinations that such a rule names itself
need not be listed, nor IPsec destinations.`,
		},
		access: list(`["192.0.2.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.MappingExempt }),
	},
	{
		Key: Key{
			Name: "hairpin", Flag: "hairpin", Kind: "bool",
			Usage: "let inside hosts reach each other by their outside endpoints (needs endpoint-independent mapping)",
			Doc: `Let the hosts of all IPv4 subnets reach hosts with endpoint-independent mapping at their
outside endpoints, in whatever inside network those are. Not for hosts that come by a link
that also leads outside (a gateway with one arm).`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.Hairpin }),
	},
	{
		Key: Key{
			Name: "heal_flows", Flag: "heal-flows", Kind: "bool",
			Usage: "end UDP flows of enabled hosts that leave with a source that your rules would not give them now",
			Doc: `End UDP flows of enabled hosts that cannot work any more, so that the next packet is
translated as your rules say now: flows older than your NAT rule, older than the address of
your uplink, or older than a failover and unanswered since. Without this key they are only
counted.`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.HealFlows }),
	},
}

// peerKeys are in the section "Peers and ports".
var peerKeys = []setting[Config]{
	{
		Key: Key{
			Name: "self", Flag: "self", Kind: "bool",
			Usage: "let peers of the gateway's own programs answer from any port, too (not with --backend nft)",
			Doc: `Let peers of the gateway's own programs (a PBX, a SIP proxy, a torrent client) answer from
any port, too. Packets of such a peer are RELATED in the input hook, so an input chain with
"ct state established,related accept" lets them in. This covers all addresses of the
gateway, translated or not, in IPv4 and IPv6, and sockets that are not connected: connected
ones, such as a resolver's, receive nothing from another port. exclude_peer_ports applies
here as well. Needs expectations, so not with backend "nft". At most 64 peers of a port at a
time; those without a live flow make room. If no IPv6 subnet is enabled, turning this on
needs a restart; a reload is not enough.`,
		},
		access: one(boolean, func(c *Config) *bool { return &c.Self }),
	},
	{
		Key: Key{
			Name: "peer_groups", Flag: "peer-group", Kind: "prefix", List: true,
			Usage: "peers of which a contact with one permits all, such as those of a SIP provider (repeatable)",
			Doc: `Peers that belong together, as prefixes: contact with one address of a group permits the
whole group. SIP providers signal from one address and send media from a neighbouring one.
Behind source NAT a group of more than 16 addresses needs the nft backend, and a forward chain
of yours that accepts 'ct status dnat'.`,
		},
		access: list(`["203.0.113.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.PeerGroups }),
	},
	{
		Key: Key{
			Name: "exclude_peers", Flag: "exclude-peer", Kind: "prefix", List: true,
			Usage: "peers that get no permission (repeatable)",
			Doc:   `Peers that get no permission, as prefixes such as "203.0.113.0/24".`,
		},
		access: list(`["203.0.113.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.ExcludePeers }),
	},
	{
		Key: Key{
			Name: "exclude_peer_ports", Flag: "exclude-peer-port", Kind: "port", List: true,
			Usage: `peer port, or range of them, towards which no permission arises, instead of the default (repeatable; "" for none)`,
			Doc: `Peer ports for which no permission is created. DNS, NTP and QUIC servers answer from the
port that was asked, and they are most of the UDP flows of a network. "10000-20000" is a
range.`,
		},
		access: one(portList, func(c *Config) *[]uint16 { return &c.ExcludePeerPorts }),
	},
	{
		Key: Key{
			Name: "exclude_ports", Flag: "exclude-port", Kind: "port", List: true,
			Usage: "outside port, or range such as 10000-20000, that never gets a permission because you forward it (repeatable)",
			Doc: `Outside ports that never get a permission, because you forward them. "10000-20000" is a
range.`,
		},
		access: one(portList, func(c *Config) *[]uint16 { return &c.ExcludePorts }),
	},
}

// limitKeys are in the section "Limits".
var limitKeys = []setting[Config]{
	{
		Key: Key{
			Name: "max_permissions", Flag: "max-permissions", Kind: "number", Min: 0, Max: 1 << 30,
			Usage: "permissions in all, 0 for no bound but the kernel's",
			Doc: `Maximum number of permissions in total. 0 means no limit; the sizes of the kernel's tables
are limits, too. Permissions without a live flow make room first.`,
		},
		access: one(count, func(c *Config) *int { return &c.MaxPermissions }),
	},
	{
		Key: Key{
			Name: "max_permissions_per_subnet", Flag: "max-permissions-per-subnet", Kind: "number", Min: 0, Max: 1 << 30,
			Usage: "permissions of one subnet, 0 for no bound",
			Doc:   `Maximum number of permissions of one subnet; 0 means no limit.`,
		},
		access: one(count, func(c *Config) *int { return &c.MaxPermissionsPerSubnet }),
	},
	{
		Key: Key{
			Name: "max_permissions_per_host", Flag: "max-permissions-per-host", Kind: "number", Min: 0, Max: 1 << 30,
			Usage: "permissions of one inside address, 0 for no bound; auto: 4096, or half of nf_conntrack_max if that is less",
			Doc: `Maximum number of permissions of one inside address; 0 means no limit. "auto" is 4096, or
half of net.netfilter.nf_conntrack_max if that is less.`,
		},
		access: one(limit, func(c *Config) *int { return &c.MaxPermissionsPerHost }).orWords("auto"),
	},
	{
		Key: Key{
			Name: "max_children", Flag: "max-children", Kind: "number", Min: 0, Max: 1 << 30,
			Usage: "flows that a peer may open by one permission, 0 for no bound; auto: 256, or 1/32 of nf_conntrack_max if that is less",
			Doc: `Limit on the live flows that a peer may have opened to one outside port; 0 means no
limit. A permitted peer, or somebody who spoofs its address, must not fill the conntrack table
from all its ports. Flows that the inside host opened do not count. Through the nftables map a
peer may open this many at once, and as many again in 30 seconds. A permission for several peers
has 16 times as many for all of them together; the daemon deletes unanswered ones beyond that.
"auto" is 256, or 1/32 of net.netfilter.nf_conntrack_max if that is less.`,
		},
		access: one(limit, func(c *Config) *int { return &c.MaxChildren }).orWords("auto"),
	},
}
