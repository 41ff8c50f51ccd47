package rules_test

// contents has the tables that all asks for, as nft lists them.
var contents = map[string]string{"inet": contentsInet, "ip": contentsIP}

const contentsIP = `
	counter admitted {
	}

	counter learned {
	}

	counter spoofed_drops {
	}

	counter unsure {
	}

	set unsure {
		type ipv4_addr . inet_service . ipv4_addr . inet_service
		size 262144
		flags dynamic,timeout
		timeout 2h
	}

	chain no_way_back {
		add @unsure { ip saddr . udp sport . ip daddr . udp dport } ct event set destroy counter name "unsure" accept comment "nothing is learned from it"
		counter name "unsure" drop comment "too many to remember"
	}

	chain way_back {
		type nat hook prerouting priority -199; policy accept;
		meta l4proto udp ip saddr @subnets goto from_inside
	}

	chain from_inside {
		meta ipsec missing fib saddr . mark . iif oif missing fib saddr . iif oif missing fib daddr type != local goto no_way_back comment "the way back is not the link that it came by"
		delete @unsure { ip saddr . udp sport . ip daddr . udp dport } comment "an earlier flow may have been spoofed"
	}

	counter learn_limited {
	}

	set outside {
		type ifname
		elements = { "ppp0",
			     "wan0" }
	}

	map permissions {
		type ipv4_addr . ipv4_addr . inet_service : ipv4_addr
		size 1000
		flags dynamic,timeout
		timeout 10m
	}

	map permission_ports {
		type ipv4_addr . ipv4_addr . inet_service : inet_service
		size 1000
		flags dynamic,timeout
		timeout 10m
	}

	map marks {
		type ipv4_addr . ipv4_addr . inet_service : mark
		size 1048576
		flags dynamic,timeout
		timeout 10m
	}

	set subnets {
		type ipv4_addr
		flags interval
		elements = { 10.47.11.0/24 }
	}

	set admitted_flows {
		type ipv4_addr . inet_service . ipv4_addr . inet_service
		size 262144
		flags dynamic,timeout
		timeout 1s
	}

	set no_peers {
		type ipv4_addr
		flags interval
		elements = { 0.0.0.0/8, 10.47.11.0/24,
			     127.0.0.0/8, 169.254.0.0/16,
			     203.0.113.6, 224.0.0.0/3 }
	}

	set alive {
		type inet_proto
		timeout 1h
		elements = { udp }
	}

	set excluded_peer_ports {
		type inet_service
		elements = { 53 }
	}

	set excluded_ports {
		type inet_service
		elements = { 5066 }
	}

	set learners {
		type ipv4_addr
		size 1000
		flags dynamic,timeout
		timeout 1m
	}

	set buckets_256 {
		type ipv4_addr . ipv4_addr . inet_service
		size 1000
		flags dynamic,timeout
		timeout 1m
	}

	set children_256 {
		type ipv4_addr . ipv4_addr . inet_service
		size 1000
		flags dynamic
	}

	set repeaters {
		type ipv4_addr . ipv4_addr . inet_service
		size 1000
		flags dynamic,timeout
		timeout 1m
	}

	set learned_flows {
		type ipv4_addr . inet_service . ipv4_addr . inet_service
		size 1000
		flags dynamic,timeout
		timeout 10m
	}

	set denied {
		type ipv4_addr . ipv4_addr . inet_service
		size 65536
		flags timeout
	}

	set full_hosts {
		type ipv4_addr
		size 4096
		flags timeout
	}

	chain made_by_conenatd {
	}

	chain admitted {
		ct status expected ct helper "conenat-0000001" jump related comment "an expectation lets it in; the chain child judges it"
		socket wildcard <= 1 accept comment "the gateway itself serves it"
		ct mark set ip saddr . ip daddr . udp dport map @marks comment "a mark for policy routing"
		update @buckets_256 { ip saddr . ip daddr . udp dport limit rate 512/minute burst 256 packets } add @children_256 { ip saddr . ip daddr . udp dport ct count 256 } ct label set 126 add @admitted_flows { ip saddr . udp sport . ip daddr . udp dport } counter name "admitted" dnat to ip saddr . ip daddr . udp dport map @permissions:ip saddr . ip daddr . udp dport map @permission_ports comment "a peer may send from any port"
	}

	chain faked_peer {
		socket wildcard <= 1 accept comment "the gateway itself serves it"
		udp sport set ip saddr . ip daddr . udp dport map @permission_ports counter name "spoofed_drops" drop comment "it would keep the peer from the inside host"
	}

	chain admit {
		type nat hook prerouting priority 2147483646; policy accept;
		meta l4proto udp iifname @outside ct zone 0 goto admitted comment "permissions are of the default zone"
		meta l4proto udp iifname != @outside ct zone 0 fib saddr . mark . iif oif missing goto faked_peer comment "the source may be faked"
	}

	chain related {
		ct mark set ip saddr . ip daddr . udp dport map @marks comment "a mark for policy routing"
		meta l4proto udp ct label set 126 add @admitted_flows { ip saddr . udp sport . ip daddr . udp dport } dnat to ip saddr . ip daddr . udp dport map @permissions:ip saddr . ip daddr . udp dport map @permission_ports comment "a peer may send from any port"
	}

	chain keep_source {
		type nat hook postrouting priority -199; policy accept;
		iifname @outside ct status dnat ct label 126 meta l4proto udp ct original ip saddr . ct original proto-src . ct original ip daddr . ct original proto-dst @admitted_flows snat to ip saddr comment "the inside host sees the peer itself"
	}

	chain learn {
		type filter hook postrouting priority 290; policy accept;
		ct state != new accept comment "answered flows end here"
		ct status confirmed numgen random mod 64 != 0 accept comment "of later packets without an answer, most end here"
		iifname @outside accept comment "a source may be spoofed"
		meta l4proto != @alive accept comment "no UDP, or the daemon has been silent for long"
		oifname != @outside accept
		ct status ! snat accept
		ct zone != 0 accept comment "permissions are of the default zone"
		meta l4proto udp ct reply proto-src @excluded_peer_ports accept
		meta l4proto udp ct reply proto-dst @excluded_ports accept
		ct original ip saddr != @subnets accept
		meta l4proto udp ct original ip saddr . ct original proto-src . ct original ip daddr . ct original proto-dst @unsure update @unsure { ct original ip saddr . ct original proto-src . ct original ip daddr . ct original proto-dst } accept comment "a source may be spoofed"
		ct reply ip saddr @no_peers accept
		ct status confirmed meta l4proto udp add @repeaters { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst limit rate over 6/minute burst 1 packets } accept comment "a flow that was seen, but for six packets a minute"
		ct original ip saddr @full_hosts accept comment "its host has reached a limit"
		meta l4proto udp ct reply ip saddr . ct reply ip daddr . ct reply proto-dst @denied accept comment "the daemon forbids it"
		add @learners { ct original ip saddr limit rate over 100/second burst 500 packets } counter name "learn_limited" accept comment "too many at a time"
		ct status ! confirmed meta l4proto udp ct reply ip saddr . ct reply proto-src . ct reply ip daddr . ct reply proto-dst @learned_flows goto passed_on comment "a flow with the same answers has ended"
		meta l4proto udp update @learned_flows { ct reply ip saddr . ct reply proto-src . ct reply ip daddr . ct reply proto-dst timeout 5m }
		ct mark != 0x00000000 meta l4proto udp add @marks { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct mark }
		meta l4proto udp add @permission_ports { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct original proto-src } add @permissions { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct original ip saddr } counter name "learned" accept comment "one that is there stays as it is"
	}

	chain passed_on {
		meta l4proto udp delete @permission_ports { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst : ct original proto-src } delete @permissions { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst : ct original ip saddr } delete @marks { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst : ct mark } comment "the outside port has passed to this host"
		meta l4proto udp update @learned_flows { ct reply ip saddr . ct reply proto-src . ct reply ip daddr . ct reply proto-dst timeout 5m }
		ct mark != 0x00000000 meta l4proto udp add @marks { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct mark }
		meta l4proto udp add @permission_ports { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct original proto-src } add @permissions { ct reply ip saddr . ct reply ip daddr . ct reply proto-dst timeout 5m : ct original ip saddr } counter name "learned" accept comment "one that is there stays as it is"
	}
}
`

const contentsInet = `
	counter expected {
	}

	counter expected_into_10.47.11.0/24 {
	}

	counter expected_into_2001_db8_47__/64 {
	}

	counter unsure {
	}

	set unsure6 {
		type ipv6_addr . inet_service . ipv6_addr . inet_service
		size 262144
		flags dynamic,timeout
		timeout 2h
	}

	chain no_way_back {
		add @unsure6 { ip6 saddr . udp sport . ip6 daddr . udp dport } ct event set destroy counter name "unsure" accept comment "nothing is learned from it"
		counter name "unsure" drop comment "too many to remember"
	}

	chain way_back {
		type filter hook prerouting priority -111; policy accept;
		meta nfproto ipv6 ct status ! confirmed meta l4proto udp goto from_inside comment "the first packet of a flow"
	}

	chain from_inside {
		ip6 saddr != @subnets6 accept
		meta ipsec missing fib saddr . mark . iif oif missing fib saddr . iif oif missing fib daddr type != local goto no_way_back comment "the way back is not the link that it came by"
		delete @unsure6 { ip6 saddr . udp sport . ip6 daddr . udp dport } comment "an earlier flow may have been spoofed"
	}

	counter guard_drops {
	}

	counter spoofed_drops {
	}

	counter child_drops {
	}

	counter port_zero_drops {
	}

	set outside {
		type ifname
		elements = { "ppp0",
			     "wan0" }
	}

	set revoked {
		type ipv6_addr . ipv6_addr . inet_service . inet_service . inet_service
		size 65536
		flags timeout
	}

	set subnets4 {
		type ipv4_addr
		flags interval
		elements = { 10.47.11.0/24 }
	}

	set subnets6 {
		type ipv6_addr
		flags interval
		elements = { 2001:db8:47::/64 }
	}

	set children4_256 {
		type ipv4_addr . ipv4_addr . inet_service
		size 1048576
		flags dynamic
	}

	set children6_256 {
		type ipv6_addr . ipv6_addr . inet_service
		size 1048576
		flags dynamic
	}

	chain made_by_conenatd {
	}

	chain before_conntrack {
		type filter hook prerouting priority raw; policy accept;
		th sport 0 meta l4proto udp jump like_an_anchor
		th dport 0 meta l4proto udp jump like_an_anchor
		@nh,96,32 & 0xffffff00 == 0xa2f0b00 meta nfproto ipv4 iifname @outside meta l4proto udp meta ipsec missing fib saddr . mark . iif oif missing goto no_way_back_outside comment "the way back is another link"
		@nh,64,32 0x20010db8 @nh,96,32 0x470000 meta nfproto ipv6 iifname @outside meta l4proto udp meta ipsec missing fib saddr . mark . iif oif missing goto no_way_back_outside comment "the way back is another link"
	}

	chain like_an_anchor {
		ip saddr @subnets4 ip daddr != @subnets4 counter name "port_zero_drops" drop comment "no packet may match an anchor"
		ip saddr != @subnets4 ip daddr @subnets4 counter name "port_zero_drops" drop comment "no packet may match an anchor"
		ip6 saddr @subnets6 ip6 daddr != @subnets6 counter name "port_zero_drops" drop comment "no packet may match an anchor"
		ip6 saddr != @subnets6 ip6 daddr @subnets6 counter name "port_zero_drops" drop comment "no packet may match an anchor"
	}

	chain no_way_back_outside {
		fib saddr . mark oifname "ppp0" accept comment "the way back is outside, too"
		fib saddr . mark oifname "wan0" accept comment "the way back is outside, too"
		fib daddr type != local counter name "spoofed_drops" drop comment "the way back is inside"
	}

	chain guard {
		type filter hook input priority 200; policy accept;
		ct state != new accept comment "conntrack knows it"
		meta l4proto != udp accept
		iifname != @outside accept
		socket wildcard <= 1 accept comment "a socket waits for it"
		counter name "guard_drops" drop comment "it would keep the peer from the inside host"
	}

	chain children {
		type filter hook forward priority filter - 10; policy accept;
		ct state != related accept
		ct status expected / expected,confirmed meta l4proto udp ct helper "conenat-0000001" goto child comment "the first packet of a child"
		ct status assured / seen-reply,assured meta l4proto icmp ct original proto-src 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
		ct status assured / seen-reply,assured meta l4proto icmp ct original proto-dst 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
		ct status assured / seen-reply,assured meta l4proto ipv6-icmp ct original proto-src 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
		ct status assured / seen-reply,assured meta l4proto ipv6-icmp ct original proto-dst 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
	}

	chain child {
		iifname != @outside meta sdifname != @outside counter name "spoofed_drops" drop comment "not by an outside link: the peer's address is faked"
		th sport 0 meta l4proto udp counter name "port_zero_drops" drop comment "it would look like an anchor"
		meta nfproto ipv4 meta l4proto udp add @children4_256 { ct original ip saddr . ct original ip daddr . ct original proto-dst ct count over 256 } counter name "child_drops" drop comment "flows of one peer to one outside endpoint"
		meta nfproto ipv6 meta l4proto udp add @children6_256 { ct original ip6 saddr . ct original ip6 daddr . ct original proto-dst ct count over 256 } counter name "child_drops" drop comment "flows of one peer to one outside endpoint"
		ct status ! dnat ip daddr != @subnets4 counter name "guard_drops" drop comment "the map has no such permission"
		counter name "expected" comment "it goes on to the user's firewall"
		goto expected_into
	}

	chain own_children {
		type filter hook input priority filter - 10; policy accept;
		ct state != related accept
		meta nfproto ipv4 ct status expected / expected,confirmed meta l4proto udp ct helper "conenat-0000001" goto own_child comment "the first packet of a child"
		ct status assured / seen-reply,assured meta l4proto icmp ct original proto-src 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
		ct status assured / seen-reply,assured meta l4proto icmp ct original proto-dst 0 counter name "port_zero_drops" drop comment "an ICMP error about an anchor"
	}

	chain own_child {
		meta nfproto ipv4 counter name "guard_drops" drop comment "the map has no such permission"
	}

	chain expected_into {
		ip6 daddr 2001:db8:47::/64 counter name "expected_into_2001_db8_47__/64" accept
		ip daddr 10.47.11.0/24 counter name "expected_into_10.47.11.0/24" accept
	}
}
`
