package nftversions

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// userRules are the user's rules. They set connmarks, which the map of permissions
// keeps. No table has a name that iptables-nft uses.
const userRules = `table ip masq {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "wan0" masquerade
	}
}
table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		ct status dnat accept
		iifname "lan0" udp sport 5061 ct mark set 0x7 accept
		iifname "lan0" accept
	}
}
`

// helperRules give flows a helper, with which no permission stands.
const helperRules = `table ip helpers {
	ct helper tftp {
		type "tftp" protocol udp
	}
	chain prerouting {
		type filter hook prerouting priority filter; policy accept;
		udp dport 69 ct helper set "tftp"
	}
}
`

// A feature is a set of options for the daemon.
type feature struct {
	name    string
	args    []string
	lab     lab.Options
	rules   string // of the user's, besides userRules
	uplinks bool
	// shows are parts of rules that the feature needs, as nft shows them.
	shows []string
}

var (
	permissions = []string{" map @permissions"}
	mapping     = []string{"--mapping=endpoint_independent"}
	hairpin     = append(slices.Clone(mapping), "--hairpin=true")
	groups      = []string{"--peer-group=203.0.113.0/28", "--peer-group=192.0.2.0/24", "--peer-group=203.0.113.128/30"}
	routed      = []string{"--routed", "--subnet", lab.InsideNet6.String()}
)

var features = []feature{
	{name: "default", shows: permissions},
	{name: "expect", args: stage.Expect},
	{name: "nft", args: stage.NFT, shows: permissions},
	{name: "without learning", args: stage.AutoByEvent, shows: permissions},
	{name: "without a guard", args: []string{"--guard=false"}, shows: permissions},
	{name: "peer groups", args: groups, shows: permissions},
	{name: "full cone", args: []string{"--filtering=endpoint_independent"}},
	{name: "mapping", args: mapping, shows: permissions},
	{name: "mapping and hairpin", args: hairpin, shows: permissions},
	{name: "two uplinks", args: hairpin, uplinks: true, shows: permissions},
	{name: "uplink marks", args: []string{"--outside=wan0", "--outside=wan1", "--uplink-marks"}, uplinks: true, shows: append([]string{"meta mark set meta mark | 0x01000000"}, permissions...)},
	{name: "one arm and mapping", args: slices.Concat(mapping, []string{"--outside=lan0", "--inside=lan1"}), shows: permissions},
	{name: "one arm, expect", args: slices.Concat(stage.Expect, mapping, []string{"--outside=lan0"})},
	{name: "several subnets", args: []string{"--subnet=10.48.0.0/17", "--subnet=10.49.0.0/24"}, shows: append([]string{"ct label 126", "admitted_into_10.48.0.0/17"}, permissions...)},
	{name: "routed IPv6", args: routed, lab: lab.Options{IPv6: true}, shows: permissions},
	{name: "helpers of the user's", args: stage.Expect, rules: helperRules, shows: []string{"@helped4 {"}},
	{name: "all at once", args: slices.Concat(hairpin, groups, []string{
		"--port-pool=62000-62999", "--exclude-peer=198.18.0.0/15", "--exclude-port=4500", "--exclude-port=4501",
		"--max-permissions=1000", "--mapping-exempt=192.0.2.128/25",
	}), uplinks: true, shows: permissions},
}

// A scene is a lab with a daemon and standing permissions.
type scene struct {
	*stage.Scene
	phone, proxy *lab.Socket
	ext          netip.AddrPort
}

// in returns the scene for a subtest.
func (s *scene) in(t *testing.T) *scene {
	part, on := *s, *s.Scene
	on.T = t
	part.Scene = &on
	return &part
}

// play starts a daemon and makes permissions, children and mappings, with and without
// a connmark.
func (f feature) play(t *testing.T) *scene {
	t.Helper()
	o := f.lab
	o.Inside, o.Rules = 2, userRules+f.rules
	if f.uplinks {
		o.Rules = stage.UplinkRules
	}
	s := &scene{Scene: stage.New(t, o)}
	if f.uplinks {
		s.AddUplink()
	}
	s.Start(stage.Flags(f.args)...)
	s.proxy = s.PeerSocket(lab.PeerA, 5060)
	for i := range 2 {
		for _, port := range []uint16{5060, 5061} {
			phone := s.InsideSocket(i, port)
			ext := s.Contact(phone, s.proxy)
			s.Contact(phone, s.PeerSocket(lab.PeerB, 20_000+uint16(i)*1000+port))
			if s.phone == nil {
				s.phone, s.ext = phone, ext
			}
			s.reaches(phone, s.PeerSocket(lab.PeerA, 20_000+uint16(i)*1000+port), ext)
		}
	}
	if o.IPv6 {
		phone := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060)
		ext := s.Contact(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5060))
		s.reaches(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
	}
	return s
}

// reaches checks that packets of from reach in by ext, after retries if need be.
func (s *scene) reaches(in, from *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	if err := lab.Arrives(in, lab.Packet{From: from, To: ext, Payload: stage.Payload("child")}); err != nil {
		s.T.Fatalf("%v\n%s", err, s.Dump())
	}
}
