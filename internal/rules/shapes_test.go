package rules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A firewall is a ruleset like those of many gateways.
type firewall struct {
	name     string
	nft      string
	iptables string
	want     string
}

var firewalls = []firewall{
	{name: "a few lines of nft", nft: lab.DropPolicy, want: "dropped accepted inet filter forward"},
	{name: "nothing", want: "accepted accepted"},
	{name: "OpenWrt", nft: strings.ReplaceAll(openWrt, "@@", ""), want: "dropped accepted inet fw4 forward"},
	{
		name: "OpenWrt with a forward", nft: strings.ReplaceAll(openWrt, "@@", `ct status dnat accept comment "!fw4: Accept port forwards"`),
		want: "accepted accepted",
	},
	{name: "firewalld", nft: firewalld, want: "accepted accepted"},
	{name: "firewalld without forwards", nft: strings.ReplaceAll(firewalld, "ct status dnat accept", ""), want: "dropped accepted inet firewalld filter_FORWARD"},
	{name: "NetworkManager shares a link", nft: networkManager, want: "dropped accepted ip nm-shared-lan0 filter_forward"},
	{name: "ufw", iptables: ufw, want: "dropped accepted ip filter FORWARD"},
	{name: "Docker", iptables: docker, want: "dropped accepted ip filter FORWARD"},
	{name: "Docker 28 on a gateway that is open", iptables: strings.Replace(docker28, ":FORWARD DROP", ":FORWARD ACCEPT", 1), want: "accepted accepted"},
	{name: "Docker 28", iptables: docker28, want: "dropped dropped ip filter FORWARD"},
	{name: "libvirt", iptables: libvirt, want: "dropped accepted ip filter FORWARD"},
	{name: "Shorewall", iptables: shorewall, want: "dropped accepted ip filter FORWARD"},
	{name: "FireHOL", iptables: fireHOL, want: "dropped dropped ip filter FORWARD"},
	{name: "LXD", nft: lxd, want: "accepted accepted"},
	{name: "Proxmox", iptables: proxmox, want: "dropped accepted ip filter FORWARD"},
	{
		name: "Shorewall with DNAT", iptables: strings.Replace(shorewall, "-A net-loc -j DROP", "-A net-loc -m conntrack --ctstate NEW -m conntrack --ctstate DNAT -j ACCEPT\n-A net-loc -j DROP", 1),
		want: "accepted accepted",
	},
	{
		name: "only forwards are let in", want: "accepted dropped inet filter forward",
		nft: `table inet filter { chain forward { type filter hook forward priority filter; policy drop
			ct state established accept
			ip protocol icmp ct state related accept
			iifname "wan0" ct state new ct status dnat accept
			iifname "lan0" accept
		}; }`,
	},
	{
		name: "flows are offloaded", want: "dropped accepted inet filter forward",
		nft: `table inet filter {
			flowtable f { hook ingress priority filter; devices = { lan0, wan0 }; }
			chain forward { type filter hook forward priority filter; policy drop
				meta l4proto { tcp, udp } ct state established,new flow add @f accept
				ct state established,related accept
				iifname "lan0" accept
			}
		}`,
	},
	{
		name: "the user accepts and another rejects", want: "dropped accepted ip nm-shared-lan0 filter_forward",
		nft: networkManager + `table inet user { chain forward { type filter hook forward priority filter - 5; policy accept; ct status dnat accept; }; }`,
	},
}

const openWrt = `table inet fw4 {
	chain forward {
		type filter hook forward priority filter; policy drop;
		meta l4proto { tcp, udp } ct state vmap { established : accept, related : accept } comment "!fw4: Handle forwarded flows"
		ct state vmap { established : accept, related : accept } comment "!fw4: Handle forwarded flows"
		iifname "lan0" jump forward_lan comment "!fw4: Handle lan IPv4/IPv6 forward traffic"
		iifname "wan0" jump forward_wan comment "!fw4: Handle wan IPv4/IPv6 forward traffic"
		jump handle_reject
	}
	chain handle_reject {
		meta l4proto tcp reject with tcp reset comment "!fw4: Reject TCP traffic"
		reject comment "!fw4: Reject any other traffic"
	}
	chain forward_lan { jump accept_to_wan comment "!fw4: Accept lan to wan forwarding"
		jump accept_to_lan
	}
	chain accept_to_lan { oifname "lan0" counter accept comment "!fw4: accept lan IPv4/IPv6 traffic"
	}
	chain accept_to_wan {
		meta nfproto ipv4 oifname "wan0" ct state invalid counter drop comment "!fw4: Prevent NAT leakage"
		oifname "wan0" counter accept comment "!fw4: accept wan IPv4/IPv6 traffic"
	}
	chain forward_wan {
		icmpv6 type { destination-unreachable, time-exceeded, echo-request, echo-reply } limit rate 1000/second counter accept
		meta l4proto esp counter jump accept_to_lan comment "!fw4: Allow-IPSec-ESP"
		udp dport 500 ip daddr 10.47.99.0/24 counter jump accept_to_lan comment "!fw4: Allow-ISAKMP"
		@@
		jump reject_to_wan
	}
	chain reject_to_wan { oifname "wan0" counter jump handle_reject comment "!fw4: reject wan IPv4/IPv6 traffic"
	}
}
`

const firewalld = `table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct status dnat accept
		iifname "lo" accept
		ct state invalid drop
		ip6 daddr { ::/96, ::ffff:0.0.0.0/96, 2002::/24, 2002:a00::/24, 2002:ac10::/28 } reject with icmpv6 addr-unreachable
		jump filter_FORWARD_ZONES
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD_ZONES {
		iifname "lan0" goto filter_FWD_internal
		iifname "wan0" goto filter_FWD_external
		goto filter_FWD_public
	}
	chain filter_FWD_internal { jump filter_FWD_internal_pre
		jump filter_FWD_internal_allow
		reject with icmpx admin-prohibited
	}
	chain filter_FWD_internal_pre { }
	chain filter_FWD_internal_allow { oifname "wan0" accept
		oifname "lan0" accept
	}
	chain filter_FWD_external { meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
	chain filter_FWD_public { meta l4proto { icmp, ipv6-icmp } accept
		reject with icmpx admin-prohibited
	}
}
`

const networkManager = `table ip nm-shared-lan0 {
	chain nat_postrouting { type nat hook postrouting priority srcnat; policy accept;
		ip saddr 10.47.11.0/24 ip daddr != 10.47.11.0/24 masquerade
	}
	chain filter_forward { type filter hook forward priority filter; policy accept;
		ip daddr 10.47.11.0/24 oifname "lan0" ct state { established, related } accept
		ip saddr 10.47.11.0/24 iifname "lan0" accept
		iifname "lan0" oifname "lan0" accept
		iifname "lan0" reject
		oifname "lan0" reject
	}
}
`

const ufw = `*filter
:FORWARD DROP [0:0]
:ufw-after-forward - [0:0]
:ufw-after-logging-forward - [0:0]
:ufw-before-forward - [0:0]
:ufw-before-logging-forward - [0:0]
:ufw-reject-forward - [0:0]
:ufw-track-forward - [0:0]
:ufw-user-forward - [0:0]
-A FORWARD -j ufw-before-logging-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-after-logging-forward
-A FORWARD -j ufw-reject-forward
-A FORWARD -j ufw-track-forward
-A ufw-after-logging-forward -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-user-forward -i lan0 -o wan0 -j ACCEPT
COMMIT
`

const docker = `*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A FORWARD -i lan0 -o wan0 -j ACCEPT
-A FORWARD -i wan0 -o lan0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p udp -m udp --dport 3478 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
`

const docker28 = `*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-BRIDGE - [0:0]
:DOCKER-CT - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -i lan0 -j ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT
-A DOCKER ! -i docker0 -o docker0 -j DROP
-A DOCKER-BRIDGE -o docker0 -j DOCKER
-A DOCKER-CT -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A DOCKER-FORWARD -j DOCKER-CT
-A DOCKER-FORWARD -j DOCKER-ISOLATION-STAGE-1
-A DOCKER-FORWARD -j DOCKER-BRIDGE
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
COMMIT
`

const libvirt = `*filter
:FORWARD ACCEPT [0:0]
:LIBVIRT_FWI - [0:0]
:LIBVIRT_FWO - [0:0]
:LIBVIRT_FWX - [0:0]
-A FORWARD -j LIBVIRT_FWX
-A FORWARD -j LIBVIRT_FWI
-A FORWARD -j LIBVIRT_FWO
-A LIBVIRT_FWI -d 10.47.11.0/24 -o lan0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A LIBVIRT_FWI -o lan0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWO -s 10.47.11.0/24 -i lan0 -j ACCEPT
-A LIBVIRT_FWO -i lan0 -j REJECT --reject-with icmp-port-unreachable
-A LIBVIRT_FWX -i lan0 -o lan0 -j ACCEPT
COMMIT
`

const shorewall = `*filter
:FORWARD DROP [0:0]
:dynamic - [0:0]
:net_frwd - [0:0]
:loc_frwd - [0:0]
:net-loc - [0:0]
:loc-net - [0:0]
:reject - [0:0]
:sha-lh - [0:0]
-A FORWARD -i wan0 -j net_frwd
-A FORWARD -i lan0 -j loc_frwd
-A FORWARD -m addrtype --dst-type BROADCAST -j DROP
-A FORWARD -j LOG --log-prefix "Shorewall:FORWARD:REJECT:" --log-level 6
-A FORWARD -g reject
-A net_frwd -m conntrack --ctstate INVALID,NEW,UNTRACKED -j dynamic
-A net_frwd -o lan0 -j net-loc
-A loc_frwd -m conntrack --ctstate INVALID,NEW,UNTRACKED -j dynamic
-A loc_frwd -o wan0 -j loc-net
-A loc-net -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A loc-net -j ACCEPT
-A net-loc -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A net-loc -m addrtype --dst-type BROADCAST -j DROP
-A net-loc -m addrtype --dst-type MULTICAST -j DROP
-A net-loc -j DROP
-A reject -m addrtype --src-type BROADCAST -j DROP
-A reject -p udp -j REJECT --reject-with icmp-port-unreachable
-A reject -j REJECT --reject-with icmp-host-prohibited
COMMIT
`

const fireHOL = `*filter
:FORWARD DROP [0:0]
:in_lan2wan - [0:0]
:out_lan2wan - [0:0]
-A FORWARD -m conntrack --ctstate INVALID -j DROP
-A FORWARD -i lan0 -o wan0 -j in_lan2wan
-A FORWARD -i wan0 -o lan0 -j out_lan2wan
-A FORWARD -p icmp -m conntrack --ctstate RELATED -j ACCEPT
-A FORWARD -p tcp -m conntrack --ctstate RELATED -m tcp --tcp-flags RST RST -j ACCEPT
-A FORWARD -m limit --limit 1/sec --limit-burst 5 -j LOG --log-prefix "PASS-unknown:"
-A FORWARD -j DROP
-A in_lan2wan -m conntrack --ctstate NEW,ESTABLISHED -j ACCEPT
-A out_lan2wan -m conntrack --ctstate ESTABLISHED -j ACCEPT
COMMIT
`

const lxd = `table inet lxd {
	chain fwd.lan0 { type filter hook forward priority filter; policy drop;
		ip version 4 oifname "lan0" accept
		ip version 4 iifname "lan0" accept
		ip6 version 6 oifname "lan0" accept
		ip6 version 6 iifname "lan0" accept
	}
}
`

const proxmox = `*filter
:FORWARD DROP [0:0]
:PVEFW-Drop - [0:0]
:PVEFW-FORWARD - [0:0]
:PVEFW-FWBR-IN - [0:0]
:PVEFW-SET-ACCEPT-MARK - [0:0]
-A FORWARD -j PVEFW-FORWARD
-A FORWARD -i lan0 -j ACCEPT
-A PVEFW-FORWARD -m conntrack --ctstate INVALID -j DROP
-A PVEFW-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A PVEFW-FORWARD -m physdev --physdev-in fwln+ --physdev-is-bridged -j PVEFW-FWBR-IN
-A PVEFW-FWBR-IN -p udp -m udp --dport 5060 -j PVEFW-SET-ACCEPT-MARK
-A PVEFW-FWBR-IN -m mark --mark 0x80000000/0x80000000 -j ACCEPT
-A PVEFW-FWBR-IN -j PVEFW-Drop
-A PVEFW-Drop -m addrtype --dst-type BROADCAST -j DROP
-A PVEFW-Drop -j DROP
-A PVEFW-SET-ACCEPT-MARK -j MARK --set-xmark 0x80000000/0x80000000
COMMIT
`

// Sends a child of each kind through each firewall. Its fate is what Children says.
func TestChildrenMeetWhatTheirFirewallSays(t *testing.T) {
	for _, f := range firewalls {
		t.Run(f.name, func(t *testing.T) {
			t.Parallel()
			g := newGate(t, lab.Options{Rules: lab.Masquerade}, granting)
			load(t, g.Lab, f)
			got := children(t, g.Lab)
			if s := strings.TrimSpace(fmt.Sprint(got.DNATed, " ", got.Related, " ", got.Dropper().Chain)); s != f.want {
				t.Errorf("got %s, want %s\n%s", s, f.want, output(t, g.Lab, "nft", "list", "ruleset"))
			}
			if got.MostDNATed != got.DNATed || got.MostRelated != got.Related {
				t.Errorf("not for all alike: %+v", got)
			}

			g.sendsChildren(got)
		})
	}
}

// sendsChildren sends a child of each kind through the firewall, which does with them what it
// does with most.
func (g *gate) sendsChildren(v userrules.ChildVerdicts) {
	g.t.Helper()
	// A later packet from outside that arrives proves that an earlier one was lost.
	in, peer := g.inside(5060), g.peer(lab.PeerA, 9000)
	p := g.contact(in, peer)
	ext := p.Ext.Netip()
	fence := lab.Packet{From: peer, To: ext, Payload: "answer"}

	g.grant(permission(ext, in.Addr(), lab.PeerB))
	meets(g.t, in, lab.Packet{From: g.peer(lab.PeerB, 0), To: ext, Payload: "by the map"}, fence, v.MostDNATed)
	permit(g.t, g.Lab, ext.String(), in.Addr().String(), lab.PeerC)
	meets(g.t, in, lab.Packet{From: g.peer(lab.PeerC, 0), To: ext, Payload: "by an expectation"}, fence, v.MostRelated)
}

// children returns what the rules do with children of the inside network.
func children(t *testing.T, l *lab.Lab) userrules.ChildVerdicts {
	t.Helper()
	n, err := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{})
	check(t, err)
	subnets := []netip.Prefix{lab.InsideNet}
	to, err := n.LinksTo(l.Gateway.FD(), subnets)
	check(t, err)
	var outside, inside []userrules.Link
	for _, x := range n.Links {
		if x.Name == "wan0" {
			outside = append(outside, userrules.Link{Index: x.Index, Name: x.Name, Masquerade: netip.MustParseAddr("198.51.100.1")})
		}
	}
	for _, x := range to {
		inside = append(inside, userrules.Link{Index: x.Index, Name: x.Name})
	}
	r := userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD(), OwnChain: rules.MarkerChain})
	defer func() { check(t, r.Close()) }()
	rs, err := r.Read()
	if err != nil {
		t.Fatal(err)
	}
	got, err := rs.Children(outside, inside, subnets)
	if err != nil {
		t.Fatal(err)
	}
	return got[0]
}

func load(t *testing.T, l *lab.Lab, f firewall) {
	t.Helper()
	if f.nft != "" {
		err := l.NFT(f.nft)
		if err != nil && strings.Contains(err.Error(), "No such file or directory") {
			t.Skipf("this kernel lacks what these rules need: %v", err)
		}
		check(t, err)
	}
	if f.iptables != "" {
		check(t, l.IPTables(lab.IPTablesNFT, f.iptables))
	}
}

func meets(t *testing.T, in *lab.Socket, p, fence lab.Packet, want userrules.Answer) {
	t.Helper()
	switch want {
	case userrules.Accepted:
		check(t, lab.Arrives(in, p))
	case userrules.Dropped:
		check(t, lab.Lost(in, p, fence))
	case userrules.Unknown:
		t.Errorf("no answer for %s", p.Payload)
	}
}
