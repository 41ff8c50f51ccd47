package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// established is the forward chain of a gateway that passes only what inside hosts began.
const established = `table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established accept
		iifname "lan0" accept
	}
}
`

// iptablesEstablished is the same for iptables and ip6tables.
const iptablesEstablished = `*filter
:FORWARD DROP
-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT
-A FORWARD -i lan0 -j ACCEPT
COMMIT
`

// iptablesEarly is a chain of prerouting that drops before NAT what nobody inside began.
const iptablesEarly = `*mangle
-A PREROUTING -i wan0 -m conntrack ! --ctstate ESTABLISHED -j DROP
COMMIT
`

// guestsOnly is the forward chain of a gateway that forgot its inside network.
var guestsOnly = strings.Replace(established, "lan0", "guest0", 1)

// iptablesGuestsOnly is the same for iptables and ip6tables.
var iptablesGuestsOnly = strings.Replace(iptablesEstablished, "lan0", "guest0", 1)

// loads returns a function that loads rules of iptables, or of nft if variant is empty.
func loads(variant, rules string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		if variant == "" {
			s.Must(s.NFT(rules))
			return
		}
		s.Must(s.IPTables(variant, rules))
	}
}

// loads6 does the same for ip6tables.
func loads6(variant, rules string) func(s *scene) {
	return loads(strings.Replace(variant, "iptables", "ip6tables", 1), rules)
}

// loadsFirewall loads a ruleset like that of a firewall program, without the lines that have
// one of the texts.
func loadsFirewall(variant, file string, without ...string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		text, err := os.ReadFile(filepath.Join("../internal/userrules/testdata/firewalls", file))
		s.Must(err)
		rules := ""
	lines:
		for line := range strings.Lines(string(text)) {
			for _, w := range without {
				if strings.Contains(line, w) {
					continue lines
				}
			}
			rules += line
		}
		if rules == string(text) && len(without) > 0 {
			s.T.Fatalf("%s has no line with one of %q", file, without)
		}
		loads(variant, rules)(s)
	}
}

// sets returns a function that runs a line in the gateway.
func sets(lines ...string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		for _, line := range lines {
			(&patient{scene: s}).shell(line)
		}
	}
}

// contacts lets the inside host contact peers on many ports.
func contacts(ports, peers int) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		for i := range ports {
			in := s.InsideSocket(0, uint16(7000+i))
			for n := range peers {
				s.Must(in.Send(s.PeerSocket(lab.PeerA, uint16(7000+i*peers+n)).Addr(), "contact"))
			}
		}
	}
}

var guestPublic = netip.MustParseAddr("198.51.200.20")

var noRules = lab.Options{Rules: lab.NoRules}

const (
	dnatIn         = "-i wan0 -p udp -d 10.47.11.0/24 -m conntrack --ctstate DNAT -j ACCEPT"
	relatedIn      = "-i wan0 -p udp -d 2001:db8:47::/64 -m conntrack --ctstate RELATED -j ACCEPT"
	relatedEarly   = "-i wan0 -p udp -m conntrack --ctstate RELATED -j ACCEPT"
	udpOut         = "-i lan0 -o wan0 -p udp -s 10.47.11.0/24 -j ACCEPT"
	dropped        = "children_dropped"
	blocked        = "hosts_blocked"
	noRule         = "no_source_nat"
	byMap          = "backend = \"nft\"\n"
	byExpectations = "backend = \"expect\"\n"
	largeGroup     = "peer_groups = [\"203.0.113.0/24\"]\n"
	oneOutsidePort = "mapping = \"endpoint_independent\"\n"
	routed         = "routed = true\n"
	masqOnWAN      = "iptables-nft -t nat -A POSTROUTING -s 10.47.11.0/24 -o wan0 -j MASQUERADE"
)

// faults has all lines of doctor, except those of firewalld, which need it
// (TestDoctorsLinesForFirewalldRepair), and those that change settings of all network namespaces
// (nf_conntrack_max, nf_conntrack_expect_max).
var faults = map[string]fault{
	// Forward chains that drop what conenatd admits.
	"nft drops children": {
		id: dropped, about: "10.47.11.0/24", options: lab.Options{Rules: lab.Masquerade + established}, running: true, lost: true,
		line: `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`,
	},
	"nft drops children, with two uplinks": {
		id: dropped, options: lab.Options{Rules: lab.Masquerade + established}, running: true, lost: true, top: "outside = [\"wan0\", \"wan1\"]\n",
		set:  func(s *scene) { s.AddLink("wan1", secondUplinkAddr) },
		line: `nft 'insert rule inet filter forward iifname { "wan0", "wan1" } ct label 126 accept'`,
	},
	"nft drops children, without a daemon": {
		id: dropped, options: lab.Options{Rules: lab.Masquerade + established},
		line: `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`,
	},
	"iptables-nft drops children": {
		id: dropped, options: noRules, running: true, lost: true,
		set: loads(lab.IPTablesNFT, lab.IPTablesMasquerade+iptablesEstablished), line: "iptables-nft -I FORWARD " + dnatIn,
	},
	"iptables-legacy drops children": {
		id: dropped, options: noRules, running: true, lost: true,
		set: loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+iptablesEstablished), line: "iptables-legacy -I FORWARD " + dnatIn,
	},
	"Docker with iptables-legacy drops what the map admits": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set: loadsFirewall(lab.IPTablesLegacy, "docker.iptables"), line: "iptables-legacy -I DOCKER-USER " + dnatIn,
	},
	"nft drops what expectations admit": {
		id: dropped, options: lab.Options{Rules: lab.Masquerade + established}, running: true, lost: true, top: byExpectations,
		line: `nft 'insert rule inet filter forward iifname "wan0" meta l4proto udp ip daddr 10.47.11.0/24 ct status dnat accept'`,
	},
	"nft drops children early": {
		id: dropped, options: lab.Options{Rules: lab.Masquerade + early("mangle", "ct state != established")}, running: true, lost: true,
		line: `nft 'insert rule inet f c iifname "wan0" meta l4proto udp ct state related accept'`,
	},
	"iptables-nft drops children early": {
		id: dropped, options: noRules, running: true, lost: true, set: loads(lab.IPTablesNFT, lab.IPTablesMasquerade+iptablesEarly),
		line: "iptables-nft -t mangle -I PREROUTING " + relatedEarly,
	},
	"iptables-legacy drops children early": {
		id: dropped, options: noRules, running: true, lost: true, set: loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+iptablesEarly),
		line: "iptables-legacy -t mangle -I PREROUTING " + relatedEarly,
	},
	"Docker drops children of a routed subnet": {
		id: dropped, options: lab.Options{IPv6: true, Rules: lab.NoRules}, running: true, lost: true, prefix: lab.InsideNet6.String(), subnet: routed,
		set:  loads6(lab.IPTablesNFT, strings.Replace(iptablesEstablished, "-A", ":DOCKER-USER -\n-A FORWARD -j DOCKER-USER\n-A", 1)),
		line: "ip6tables-nft -I DOCKER-USER " + relatedIn,
	},
	"ufw drops children of a routed subnet": {
		id: dropped, options: lab.Options{IPv6: true, Rules: lab.NoRules}, running: true, lost: true, prefix: lab.InsideNet6.String(), subnet: routed,
		set:  loads6(lab.IPTablesLegacy, strings.Replace(iptablesEstablished, "-A", ":ufw6-before-forward -\n-A FORWARD -j ufw6-before-forward\n-A", 1)),
		line: "ip6tables-legacy -I ufw6-before-forward " + relatedIn,
	},
	"the mangle table drops children": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set:  loads(lab.IPTablesNFT, lab.IPTablesMasquerade+"*mangle\n-A FORWARD -i wan0 -m conntrack --ctstate NEW -j DROP\nCOMMIT\n"),
		line: "iptables-nft -t mangle -I FORWARD " + dnatIn,
	},
	"ufw drops what the map admits": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set: loadsFirewall(lab.IPTablesNFT, "ufw.iptables"), line: "iptables-nft -I ufw-before-forward " + dnatIn,
	},
	"ufw with iptables-legacy drops what the map admits": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set: loadsFirewall(lab.IPTablesLegacy, "ufw.iptables"), line: "iptables-legacy -I ufw-before-forward " + dnatIn,
	},
	"Docker drops what the map admits": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set: loadsFirewall(lab.IPTablesNFT, "docker.iptables"), line: "iptables-nft -I DOCKER-USER " + dnatIn,
	},
	"nft drops what only the map admits": {
		id: dropped, about: "10.47.11.0/24 peer_groups", options: lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, running: true, top: largeGroup,
		line: `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`,
	},
	"nft drops what only the map admits, without a daemon": {
		id: dropped, about: "10.47.11.0/24 peer_groups", options: lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, top: largeGroup,
		line: `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`,
	},
	"nft drops what is open to everybody, without a daemon": {
		id: dropped, about: "10.47.11.0/24", options: lab.Options{Rules: lab.Masquerade + lab.DropPolicy}, subnet: "filtering = \"endpoint_independent\"\n",
		line: `nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`,
	},
	"iptables-legacy drops what only the map admits": {
		id: dropped, about: "10.47.11.0/24 peer_groups", options: noRules, running: true, top: largeGroup,
		set: loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+lab.IPTablesDropPolicy), line: "iptables-legacy -I FORWARD " + dnatIn,
	},
	"fw4 drops what the map admits": {
		id: dropped, options: noRules, running: true, lost: true, top: byMap,
		set:  loadsFirewall("", "fw4.nft", "Accept port forwards"),
		line: `nft 'insert rule inet fw4 forward iifname "wan0" ct label 126 accept'`,
	},
	"nft drops children of a routed subnet": {
		id: dropped, options: lab.Options{IPv6: true, Rules: established}, running: true, lost: true, prefix: lab.InsideNet6.String(), subnet: routed,
		line: `nft 'insert rule inet filter forward iifname "wan0" meta l4proto udp ip6 daddr 2001:db8:47::/64 ct state related accept'`,
	},
	"ip6tables-nft drops children": {
		id: dropped, options: lab.Options{IPv6: true, Rules: lab.NoRules}, running: true, lost: true, prefix: lab.InsideNet6.String(), subnet: routed,
		set: loads6(lab.IPTablesNFT, iptablesEstablished), line: "ip6tables-nft -I FORWARD " + relatedIn,
	},
	"ip6tables-legacy drops children": {
		id: dropped, options: lab.Options{IPv6: true, Rules: lab.NoRules}, running: true, lost: true, prefix: lab.InsideNet6.String(), subnet: routed,
		set: loads6(lab.IPTablesLegacy, iptablesEstablished), line: "ip6tables-legacy -I FORWARD " + relatedIn,
	},

	// Forward chains that let nothing out.
	"nft blocks hosts": {
		id: blocked, about: "10.47.11.0/24", options: lab.Options{Rules: lab.Masquerade + guestsOnly}, running: true, cut: true,
		line: `nft 'insert rule inet filter forward iifname "lan0" oifname "wan0" meta l4proto udp ip saddr 10.47.11.0/24 accept'`,
	},
	"nft blocks hosts, without a daemon": {
		id: blocked, about: "10.47.11.0/24", options: lab.Options{Rules: lab.Masquerade + guestsOnly}, cut: true,
		line: `nft 'insert rule inet filter forward iifname "lan0" oifname "wan0" meta l4proto udp ip saddr 10.47.11.0/24 accept'`,
	},
	"iptables-nft blocks hosts": {
		id: blocked, options: noRules, running: true, cut: true, set: loads(lab.IPTablesNFT, lab.IPTablesMasquerade+iptablesGuestsOnly),
		line: "iptables-nft -I FORWARD " + udpOut,
	},
	"iptables-legacy blocks hosts": {
		id: blocked, options: noRules, running: true, cut: true, set: loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+iptablesGuestsOnly),
		line: "iptables-legacy -I FORWARD " + udpOut,
	},
	"ip6tables-nft blocks hosts": {
		id: blocked, options: lab.Options{IPv6: true, Rules: lab.NoRules}, running: true, prefix: lab.InsideNet6.String(), subnet: routed,
		set: loads6(lab.IPTablesNFT, iptablesGuestsOnly), line: "ip6tables-nft -I FORWARD -i lan0 -o wan0 -p udp -s 2001:db8:47::/64 -j ACCEPT",
	},
	"nft blocks hosts of a routed subnet": {
		id: blocked, options: lab.Options{IPv6: true, Rules: guestsOnly}, running: true, prefix: lab.InsideNet6.String(), subnet: routed,
		line: `nft 'insert rule inet filter forward iifname "lan0" oifname "wan0" meta l4proto udp ip6 saddr 2001:db8:47::/64 accept'`,
	},
	"ufw blocks hosts": {
		id: blocked, options: noRules, running: true, cut: true, set: loadsFirewall(lab.IPTablesNFT, "ufw.iptables", "-i lan0"),
		line: "iptables-nft -I ufw-before-forward " + udpOut,
	},
	"Docker blocks hosts": {
		id: blocked, options: noRules, running: true, cut: true, set: loadsFirewall(lab.IPTablesNFT, "docker.iptables", "-i lan0"),
		line: "iptables-nft -I DOCKER-USER " + udpOut,
	},
	"fw4 blocks hosts": {
		id: blocked, options: noRules, running: true, cut: true, set: loadsFirewall("", "fw4.nft", "fw4: accept wan IPv4"),
		line: `nft 'insert rule inet fw4 forward iifname "lan0" oifname "wan0" meta l4proto udp ip saddr 10.47.11.0/24 accept'`,
	},

	// Source NAT.
	"nft does not translate": {
		id: noRule, options: lab.Options{Rules: "table inet empty { }\n"}, running: true, cut: true,
		line: `nft 'table ip source_nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan0" ip saddr 10.47.11.0/24 masquerade; }; }'`,
	},
	"nothing translates, without a daemon": {
		id: noRule, options: noRules, cut: true,
		line: `nft 'table ip source_nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan0" ip saddr 10.47.11.0/24 masquerade; }; }'`,
	},
	"iptables-nft does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loads(lab.IPTablesNFT, lab.IPTablesDropPolicy), line: masqOnWAN,
	},
	"iptables-legacy does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loads(lab.IPTablesLegacy, lab.IPTablesDropPolicy),
		line: strings.Replace(masqOnWAN, "nft", "legacy", 1),
	},
	"ufw does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loadsFirewall(lab.IPTablesNFT, "ufw.iptables", "MASQUERADE"), line: masqOnWAN,
	},
	"ufw with iptables-legacy does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loadsFirewall(lab.IPTablesLegacy, "ufw.iptables", "MASQUERADE"),
		line: strings.Replace(masqOnWAN, "nft", "legacy", 1),
	},
	"Docker does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loadsFirewall(lab.IPTablesNFT, "docker.iptables", "-o wan0 -j MASQUERADE"), line: masqOnWAN,
	},
	"fw4 does not translate": {
		id: noRule, options: noRules, running: true, cut: true, set: loadsFirewall("", "fw4.nft", "jump srcnat_wan"),
		line: `nft 'insert rule inet fw4 srcnat oifname "wan0" ip saddr 10.47.11.0/24 masquerade'`,
	},
	"nothing translates on the second uplink": {
		id: "subnet_not_translated", about: "10.47.11.0/24 wan1", options: lab.Options{Rules: natBy("wan0")}, running: true, top: "outside = [\"wan0\", \"wan1\"]\n",
		set:  func(s *scene) { s.AddLink("wan1", secondUplinkAddr) },
		line: `nft 'table ip source_nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan1" ip saddr 10.47.11.0/24 masquerade; }; }'`,
	},
	"flows leave untranslated": {
		id: "no_source_nat", options: lab.Options{Rules: "table ip without_nat { }"}, running: true, cut: true, later: contacts(3, 1),
		again: func(s *scene) { s.Contact(s.InsideSocket(0, 7100), s.PeerSocket(lab.PeerA, 7100)) },
		line:  `nft 'table ip source_nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "wan0" ip saddr 10.47.11.0/24 masquerade; }; }'`,
	},
	"nft keeps packets of hosts from conntrack": {
		id: "udp_not_tracked", options: lab.Options{Rules: lab.Masquerade + `table inet raw { chain pre { type filter hook prerouting priority raw; iifname "lan0" meta l4proto udp notrack; }; }
`}, running: true, cut: true, line: "nft delete rule inet raw pre handle 2",
	},
	"nft keeps packets of peers from conntrack": {
		id: "udp_not_tracked", options: lab.Options{Rules: lab.Masquerade + `table inet raw { chain pre { type filter hook prerouting priority raw; iifname "wan0" meta l4proto udp notrack; }; }
`}, running: true, line: "nft delete rule inet raw pre handle 2",
		again: func(s *scene) {
			phone, peer := s.InsideSocket(0, 6200), s.PeerSocket(lab.PeerA, 6200)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 6201), s.Contact(phone, peer))
		},
	},
	"iptables-nft keeps packets from conntrack": {
		id: "udp_not_tracked", options: noRules, cut: true,
		set:  loads(lab.IPTablesNFT, lab.IPTablesMasquerade+"*raw\n-A PREROUTING -p udp -m udp ! --dport 53 -j CT --notrack\nCOMMIT\n"),
		line: "nft delete rule ip raw PREROUTING handle 2",
	},
	"iptables-legacy keeps packets from conntrack": {
		id: "udp_not_tracked", options: noRules, cut: true,
		set:  loads(lab.IPTablesLegacy, lab.IPTablesMasquerade+"*raw\n-A PREROUTING -i lan0 -p udp -j CT --notrack\nCOMMIT\n"),
		line: "iptables-legacy -t raw -D PREROUTING -i lan0 -p udp -j CT --notrack",
	},
	"random ports by rule": {
		id: "source_nat_random", options: lab.Options{Rules: strings.Replace(lab.Masquerade, "masquerade", "masquerade fully-random", 1)}, running: true,
		line: strings.TrimSpace(oneOutsidePort),
	},
	"another port for each peer": {
		id: "port_per_peer", options: lab.Options{Rules: strings.Replace(lab.Masquerade, "masquerade", "masquerade fully-random", 1)}, running: true,
		later: contacts(1, 20), line: strings.TrimSpace(oneOutsidePort),
	},
	"ports chosen by rule": {
		id: "ports_chosen_by_rule", options: lab.Options{Rules: lab.MasqueradeRange(20000, 20999)}, running: true, subnet: oneOutsidePort,
		line: `port_pool = "none"`,
	},
	"flows older than the rule": {
		id: "broken_flows", options: lab.Options{Rules: tracked}, running: true,
		later: func(s *scene) {
			s.T.Helper()
			s.Must(s.InsideSocket(0, 7000).Send(s.PeerSocket(lab.PeerA, 7000).Addr(), "before the rule"))
			s.Must(s.NFT(lab.Masquerade))
		},
		line: "heal_flows = true",
	},

	// The kernel's settings.
	"IPv4 forwarding is off": {
		id: "forwarding_off", about: lab.InsideNet.String(), running: true, cut: true, set: sets("sysctl -w net.ipv4.ip_forward=0"), line: "sysctl -w net.ipv4.ip_forward=1",
	},
	"IPv4 forwarding is off on a link": {
		id: "forwarding_off", about: lab.InsideNet.String(), cut: true, set: sets("sysctl -w net.ipv4.conf.lan0.forwarding=0"),
		line: "sysctl -w net.ipv4.conf.lan0.forwarding=1",
	},
	"IPv6 forwarding is off": {
		id: "forwarding_off", about: lab.InsideNet6.String(), options: lab.Options{IPv6: true}, prefix: lab.InsideNet6.String(), subnet: routed, running: true,
		set: sets("sysctl -w net.ipv6.conf.all.forwarding=0"), line: "sysctl -w net.ipv6.conf.all.forwarding=1",
	},
	"short timeout": {
		id: "timeouts_short", set: sets("sysctl -w net.netfilter.nf_conntrack_udp_timeout_stream=60"),
		line: "sysctl -w net.netfilter.nf_conntrack_udp_timeout_stream=120",
	},
	"shorter timeout": {
		id: "timeouts_short", set: sets("sysctl -w net.netfilter.nf_conntrack_udp_timeout=10"), line: "sysctl -w net.netfilter.nf_conntrack_udp_timeout=30",
	},
	"strict reverse path": {
		id: "reverse_path_strict", top: "outside = [\"wan0\", \"wan.1\"]\n",
		set: func(s *scene) {
			s.AddLink("wan.1", secondUplinkAddr)
			sets("sysctl -w net.ipv4.conf.all.rp_filter=1")(s)
		},
		line: "sysctl -w net/ipv4/conf/wan.1/rp_filter=2",
	},
	"an uplink for each flow": {
		id: "uplink_per_flow",
		set: func(s *scene) {
			s.AddLink("wan1", secondUplinkAddr)
			s.IP(s.Gateway, "route replace default nexthop via 198.51.100.254 dev wan0 nexthop via 198.51.100.254 dev wan1 onlink")
			sets("sysctl -w net.ipv4.fib_multipath_hash_policy=1")(s)
		},
		line: "sysctl -w net.ipv4.fib_multipath_hash_policy=0",
	},
	"no events": {
		id: "events_off", running: true, set: sets("sysctl -w net.netfilter.nf_conntrack_events=0"), line: "sysctl -w net.netfilter.nf_conntrack_events=1",
	},
	"no accounting": {
		id: "accounting_off", running: true, later: sets("sysctl -w net.netfilter.nf_conntrack_acct=0"), line: "sysctl -w net.netfilter.nf_conntrack_acct=1",
	},
	"local ports in the pool": {
		id: "pool_moved", running: true, subnet: oneOutsidePort, set: sets(`sysctl -w net.ipv4.ip_local_port_range="32768 65535"`),
		line: "sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535",
	},
	"local ports leave no pool": {
		id: "would_not_start", subnet: oneOutsidePort, set: sets(`sysctl -w net.ipv4.ip_local_port_range="1024 65535"`),
		line: "sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535",
	},

	"local ports are widened into the pool": {
		id: "pool_overlaps_local_ports", running: true, subnet: oneOutsidePort, later: sets(`sysctl -w net.ipv4.ip_local_port_range="1024 65535"`),
		line: "sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535",
	},
	"IPv6 forwarding is off, and the default route is advertised": {
		id: "forwarding_off", about: lab.InsideNet6.String(), options: lab.Options{IPv6: true}, prefix: lab.InsideNet6.String(), subnet: routed, running: true,
		set:  sets("sysctl -w net.ipv6.conf.all.forwarding=0", "sysctl -w net.ipv6.conf.wan0.accept_ra=1"),
		line: "sysctl -w net.ipv6.conf.wan0.accept_ra=2",
	},

	// The configuration.
	"rules that only root may read": {
		id: "source_nat_hidden", running: true, subnet: oneOutsidePort, line: `port_pool = "none"`,
		set: func(s *scene) {
			s.T.Helper()
			s.Must(s.IPTables(lab.IPTablesLegacy, "*nat\nCOMMIT\n"))
			s.Must(os.Chmod(filepath.Dir(s.T.TempDir()), 0o755)) // it reads the configuration
			s.Exe = s.unprivileged()
		},
	},
	"a bridge with a firewall of its own": {
		id: "second_zone", options: lab.Options{Rules: lab.Masquerade + bridgeFirewall}, running: true, set: bridgeWithAFirewall,
		later: contacts(1, 1), again: (*scene).hearsInBothZones, line: "routed = true",
	},
	"no subnet": {
		id: "no_subnet", prefix: "none", line: "conenatd run --subnet 10.47.11.0/24",
	},
	"a large group without the map": {
		id: "large_peer_groups", running: true, top: "backend = \"expect\"\npeer_groups = [\"203.0.113.0/24\"]\n", line: `backend = "auto"`,
	},
	"packets in a zone, expectations alone": {
		id: "packets_in_zone", options: byRules(lab.Masquerade + acceptsBoth + zonesOf(zonesByDirection["each link has one"])),
		top: "backend = \"expect\"\n", running: true, lost: true, later: (*scene).peerInZone, line: `backend = "auto"`,
	},
	"IPv6 by the map alone": {
		id: "no_carrier", options: lab.Options{IPv6: true, Rules: lab.Masquerade + acceptsBoth}, prefix: lab.InsideNet6.String(), subnet: routed,
		top: byMap, running: true, line: `backend = "auto"`,
	},
	"zones of both directions by the map alone": {
		id:  "no_carrier",
		top: byMap, running: true, later: contacts(1, 1), line: `backend = "auto"`,
		options: byRules(lab.Masquerade + acceptsBoth + `table inet zones { chain c { type filter hook prerouting priority raw; iifname { "lan0", "wan0" } ct zone set 250; }; }
`),
	},
	"IPv6 is not routed": {
		id: "ipv6_not_routed", options: lab.Options{IPv6: true}, prefix: lab.InsideNet6.String(), line: "routed = true",
	},
	"peers behind another link": {
		id: "peers_behind_link", about: "guest0", options: lab.Options{Guest: true, Rules: natBy()}, running: true,
		set: func(s *scene) {
			s.IP(s.Gateway, "addr add 198.51.200.1/24 dev guest0")
			s.IP(s.Guest, "addr add 198.51.200.20/24 dev eth0")
		},
		later: func(s *scene) {
			s.Must(s.InsideSocket(0, 7000).Send(s.Socket(s.Guest.Namespace, guestPublic, 7000).Addr(), "contact"))
		},
		line: `outside = ["wan0", "guest0"]`,
	},
	"peers answer by another link": {
		id: "peers_by_other_link", about: "wan1", running: true, lost: true,
		options: lab.Options{Rules: "table ip nat { chain post { type nat hook postrouting priority srcnat; oifname wan0 snat to " + secondUplinkAddr + "; }; }\n"},
		set:     func(s *scene) { s.AddLink("wan1", secondUplinkAddr) },
		later: func(s *scene) {
			phone, proxy := s.InsideSocket(0, 7000), s.PeerSocket(lab.PeerA, 7000)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			s.Lost(phone, s.PeerSocket(lab.PeerA, 7001), ext, proxy)
		},
		line: `outside = ["wan0", "wan1"]`,
	},
	"a link that a rule shows": {
		id: "link_assumed_outside", about: "wan1", options: lab.Options{Rules: natBy("wan0", "wan1")},
		set: func(s *scene) {
			s.AddLink("wan1", secondUplinkAddr)
			s.IP(s.Gateway, fmt.Sprintf("route add %s/32 via 198.51.100.254 dev wan1 onlink", lab.PeerC))
		},
		line: `outside = ["wan0", "wan1"]`,
	},
	"a dead daemon": {
		id: "tables_left",
		set: func(s *scene) {
			s.Serve()
			s.Kill()
		},
		line: "conenatd cleanup",
	},
}
