package e2e

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// acceptsBoth is a forward chain that accepts related flows, and DNATed ones.
const acceptsBoth = lab.DropPolicy + "insert rule inet filter forward ct status dnat accept\n"

// usual are the rules of most of these gateways.
var usual = lab.Options{Inside: 2, Rules: lab.Masquerade + acceptsBoth}

// also are these rules beside those of usual.
func also(rules string) lab.Options { return lab.Options{Inside: 2, Rules: usual.Rules + rules} }

// byRules are rules in place of usual's.
func byRules(rules string) lab.Options { return lab.Options{Inside: 2, Rules: rules} }

// forwardChain is a chain of port forwards.
func forwardChain(priority, rules string) string {
	return fmt.Sprintf("table ip forwards { chain pre { type nat hook prerouting priority %s; %s; }; }\n", priority, rules)
}

const (
	droppedBoth = "the forward chain accepts neither RELATED nor DNATed flows"
	droppedMap  = "the map alone carries these permissions, and the forward chain does not accept DNATed flows"
	portsByRule = "a rule of the user's chooses outside ports"
)

// setups are the rows of docs/results/gateways.md up to 38.
var setups = []setup{
	{row: "1", what: "SIP helper", fault: fault{options: also(sipHelper)}},
	{
		row: "1", what: "SIP helper, the forward chain accepts RELATED flows alone", cause: droppedMap,
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy + sipHelper), lost: true}, finds: []string{dropped},
	},
	{
		row: "2", what: "source NAT at priority 95, endpoint-independent mapping",
		fault: fault{options: byRules(natChain("95", "masquerade") + acceptsBoth), subnet: oneOutsidePort}, plays: keepsPort,
	},
	{
		row: "2", what: "a younger source NAT chain at priority -199, endpoint-independent mapping", cause: "that chain comes before the mapping",
		fault: fault{options: usual, subnet: oneOutsidePort, later: loads("", `table ip first { chain c { type nat hook postrouting priority -199; oifname "wan0" masquerade; }; }`)},
		finds: []string{"chain_before_mapping"},
	},
	{row: "3", what: "a port forward at priority -90", fault: fault{options: also(forwardChain("-90", `iifname "wan0" udp dport 7000 dnat to 10.47.11.110`))}},
	{
		row: "4", what: "the gateway serves a port within ip_local_port_range, endpoint-independent mapping",
		fault: fault{options: usual, subnet: oneOutsidePort, set: holds("0.0.0.0", 41641)}, plays: keepsPort,
	},
	{
		row: "5", what: "sockets of the gateway in the port pool, endpoint-independent mapping",
		fault: fault{options: usual, subnet: oneOutsidePort, set: holds("0.0.0.0", 62000)}, plays: keepsPort, finds: []string{"pool_ports_served"},
	},
	{row: "6", what: "side router with one link", fault: fault{options: byRules(armNAT), set: (*scene).oneArm}, finds: []string{"one_link_to_both_sides"}},
	{
		row: "6", what: "side router with one link, no subnet named, no daemon", cause: "no subnet is enabled",
		fault: fault{options: byRules(armNAT), set: (*scene).oneArm, prefix: "none"}, bare: true, finds: []string{"no_subnet"},
	},
	{
		row: "7", what: "flows older than the masquerade rule", cause: "these flows go on untranslated",
		fault: fault{options: byRules(tracked), later: faults["flows older than the rule"].later}, plays: noPlay, finds: []string{"broken_flows"},
	},
	{
		row: "7c", what: "failover by route to another uplink, masquerade, endpoint-independent mapping",
		fault: fault{options: byRules(bothUplinks), subnet: oneOutsidePort, set: all(backupUplink, looseReversePath)}, plays: failsOver,
	},
	{
		row: "8", what: "the inside link has a default route", fault: fault{options: usual, set: ip("route add default via 10.47.11.110 dev lan0 metric 200")},
		finds: []string{"default_route_inside"},
	},
	{row: "9", what: "nftables accepts established flows alone", cause: droppedBoth, fault: fault{options: byRules(lab.Masquerade + established), lost: true}, finds: []string{dropped}},
	{
		row: "9", what: "the same by iptables-nft", cause: droppedBoth,
		fault: fault{options: noRules, set: loads(lab.IPTablesNFT, lab.IPTablesMasquerade+iptablesEstablished), lost: true}, finds: []string{dropped},
	},
	{
		row: "9", what: "the same by iptables-legacy", cause: droppedBoth,
		fault: fault{options: noRules, set: loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+iptablesEstablished), lost: true}, finds: []string{dropped},
	},
	{row: "9", what: "DNATed flows accepted in state NEW, RELATED ones not", fault: fault{options: byRules(lab.Masquerade + established + "add rule inet filter forward ct state new ct status dnat accept\n")}},
	{row: "10", what: "masquerade towards the inside, too", fault: fault{options: byRules(natBy() + acceptsBoth)}},
	{row: "11", what: "conntrack zones of the original direction", fault: fault{options: also(zonesOf(zonesByDirection["each link has one"]))}, plays: zonesPlay},
	{
		row: "11", what: "the same, the forward chain accepts RELATED flows alone", cause: "expectations do not work in the zone of packets from outside",
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy + zonesOf(zonesByDirection["each link has one"])), lost: true}, plays: zonesPlay, finds: []string{"packets_in_zone"},
	},
	{
		row: "11", what: "zones of both directions, endpoint-independent mapping", cause: "each zone has its own outside endpoints: no mapping",
		fault: fault{options: also(`table inet zones { chain c { type filter hook prerouting priority raw; iifname { "lan0", "wan0" } ct zone set 250; }; }`), subnet: oneOutsidePort, later: contacts(20, 1)},
		finds: []string{"flows_not_mapped"},
	},
	{
		row: "12", what: "MAP-E, endpoint-independent mapping", cause: portsByRule,
		fault: fault{options: byRules(natChain("srcnat", numgen()) + acceptsBoth), subnet: oneOutsidePort}, finds: []string{"ports_chosen_by_rule"},
	},
	{
		row: "13", what: "CGNAT with a block of ports for each customer, endpoint-independent mapping", cause: portsByRule,
		fault: fault{options: byRules(natChain("srcnat", "ip saddr 10.47.11.109 masquerade to :1024-2023", "masquerade to :2024-3023") + acceptsBoth), subnet: oneOutsidePort},
		finds: []string{"ports_chosen_by_rule"},
	},
	{row: "14", what: "a port forward for one provider", fault: fault{options: also(forwardChain("dstnat", forOneProvider))}, plays: reachesBesideAForward},
	{
		row: "14", what: "the same, the forward chain accepts RELATED flows alone", cause: droppedMap,
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy + forwardChain("dstnat", forOneProvider))},
		plays: losesTheProvider, finds: []string{dropped},
	},
	{
		row: "15", what: "road warriors with addresses of the LAN, by policy routing", cause: "a routing rule hides the way back to them, so their flows earn no permission",
		fault: fault{options: usual, set: roadWarrior}, plays: warriorPasses, finds: []string{"way_back_unknown"},
	},
	{
		row: "16", what: "a VPN without a default route", fault: fault{options: byRules(natBy("wan0", "vpn0") + acceptsBoth), set: func(s *scene) { s.addVPN("203.0.113.0/24") }},
		plays: func(p *patient) { p.works(lab.PeerA, 5060, netip.MustParseAddr(vpnAddr)) }, finds: []string{"link_assumed_outside"},
	},
	{
		row: "18", what: "VRRP with a virtual MAC", fault: fault{options: byRules(strings.Replace(lab.Masquerade, "masquerade", "snat to "+virtualAddr, 1) + acceptsBoth), set: virtualMAC},
	},
	{row: "19", what: "outside addresses on no link", fault: fault{options: byRules(toRouted), set: outsideAddr("on no link"), subnet: oneOutsidePort}},
	{row: "20", what: "outside addresses on a link of no one, endpoint-independent mapping", fault: fault{options: byRules(toRouted), set: outsideAddr("a link of no one"), subnet: oneOutsidePort}},
	{
		row: "21", what: "two uplinks of equal cost, hash policy 1", cause: "the kernel chooses an uplink for each flow",
		fault: fault{options: byRules(bothUplinks), set: all(faults["an uplink for each flow"].set, looseReversePath)},
		plays: noPlay, finds: []string{"uplink_per_flow"},
	},
	{row: "22", what: "TFTP helper", fault: fault{options: also(tftpHelper)}, plays: func(p *patient) { p.reaches(69, true) }},
	{
		row: "22", what: "TFTP helper, the forward chain accepts RELATED flows alone", cause: droppedMap,
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy + tftpHelper)}, plays: func(p *patient) { p.reaches(69, false) }, finds: []string{dropped},
	},
	{row: "23", what: "programs of the gateway itself, `self = true`", fault: fault{options: usual, top: "self = true\n"}, plays: selfIsReached},
	{
		row: "23", what: "the gateway's own address as a subnet", cause: "no host has that address",
		fault: fault{options: usual, prefix: "198.51.100.1/32"}, plays: noPlay, finds: []string{"subnet_is_own_address"},
	},
	{row: "25", what: "Docker shares the link", fault: fault{options: noRules, set: loadsFirewall(lab.IPTablesNFT, "docker.iptables")}},
	{
		row: "25", what: "the same, `backend = \"nft\"`", cause: "Docker's chains reject what only the map admits",
		fault: fault{options: noRules, set: loadsFirewall(lab.IPTablesNFT, "docker.iptables"), top: byMap, lost: true}, finds: []string{dropped},
	},
	{
		row: "26", what: "systemd-networkd forwards by a map",
		fault: fault{options: also(`table ip forwards { map m { type inet_service : ipv4_addr; elements = { 7000 : 10.47.11.110 }; }; chain pre { type nat hook prerouting priority dstnat; iifname "wan0" dnat to udp dport map @m; }; }`)},
	},
	{
		row: "27", what: "a bridge with a firewall of its own (Proxmox)", cause: "the bridge tracks the flow a second time, in zone 1",
		fault: fault{options: byRules(lab.Masquerade + bridgeFirewall), set: bridgeWithAFirewall, lost: true}, finds: []string{"second_zone"},
	},
	{
		row: "28", what: "`ip_local_port_range` 32768-65535, endpoint-independent mapping", cause: "the port pool lies in that range",
		fault: fault{options: usual, subnet: oneOutsidePort, set: sets(`sysctl -w net.ipv4.ip_local_port_range="32768 65535"`)}, plays: keepsPort, finds: []string{"pool_moved"},
	},
	{
		row: "28", what: "`ip_local_port_range` 1024-65535, endpoint-independent mapping, no daemon", cause: "that range leaves no port for a pool",
		fault: fault{options: usual, subnet: oneOutsidePort, set: sets(`sysctl -w net.ipv4.ip_local_port_range="1024 65535"`)}, bare: true, finds: []string{"would_not_start"},
	},
	{row: "29", what: "a socket of the gateway's at an inside address", fault: fault{options: usual, subnet: oneOutsidePort, set: holds("10.47.11.1", 5060)}},
	{row: "30", what: "2,000 NAT rules of others", fault: fault{options: usual, set: manyForwards}},
	{row: "31", what: "links and routes come and go", fault: fault{options: usual, later: flaps}},
	{row: "32", what: "the saved ruleset has conenatd's tables", cause: "it was listed while conenatd ran", fault: fault{options: usual}, plays: savesRuleset, finds: []string{"rules_saved_with_tables"}},
	{
		row: "33", what: "the subnet was renumbered", cause: "no link has the subnet that the configuration names",
		fault: fault{options: usual, later: renumbers}, plays: noPlay, finds: []string{"subnet_on_no_link"},
	},
	{row: "33", what: "the subnet was renumbered, `prefix = \"lan0\"`", fault: fault{options: usual, prefix: "lan0", later: renumbers}, plays: renumberedIsServed},
	{
		row: "34", what: "`nf_conntrack_udp_timeout` 300, reconcile 10m, endpoint-independent mapping",
		fault: fault{options: usual, subnet: oneOutsidePort, set: sets("sysctl -w net.netfilter.nf_conntrack_udp_timeout=300")}, plays: keepsPort,
	},
	{row: "35", what: "a user namespace, no daemon", fault: fault{prefix: "10.47.11.0/24"}, bare: true, plays: inUserNamespace},
	{row: "36", what: "a new port forward while flows begin", fault: fault{options: also(forwardChain("dstnat", "udp dport 9 accept"))}, plays: forwardsLater},
	{
		row: "38", what: "a group of 16 peers, the forward chain accepts RELATED flows alone",
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy), top: "peer_groups = [\"203.0.113.0/28\"]\n"}, plays: groupGetsIn,
	},
	{
		row: "38", what: "a group of 256 peers, the forward chain accepts RELATED flows alone", cause: droppedMap,
		fault: fault{options: byRules(lab.Masquerade + lab.DropPolicy), top: largeGroup}, plays: groupIsLost, finds: []string{dropped},
	},
}
