package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// A routing rule of the user's leads packets with a type of service to another uplink, by a table
// with nothing but a default route. The kernel looks the way back of a host's packet up with the
// packet's own type of service, so that its flow earns nothing. Status says so, and what it names
// helps.
//
// Fails when such flows are left out silently or told only after a reconcile, and when the link in inside does not help.
func TestWayBackHiddenByARoutingRule(t *testing.T) {
	for name, rule := range map[string]string{"tos": "tos 0x10", "port": "ipproto udp dport 7000", "none": ""} {
		t.Run(name, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			if rule != "" {
				s.IP(s.Gateway, "rule add "+rule+" table 109")
			}
			s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600")) // the flow outlives a daemon
			phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
			if name == "tos" {
				_, err := s.Inside(0).Output("nft", "add table ip t; add chain ip t o { type filter hook output priority 0; }; add rule ip t o ip dscp set 4")
				s.Must(err)
			}
			s.Serve("--reconcile=1h")
			ext := s.Contact(phone, peer)
			if name != "tos" {
				s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
				s.Arrives(phone, other, ext)
				s.tellsWayBack(false)
				return
			}
			s.Until("status tells of it", func() bool {
				return strings.Contains(strings.Join(s.Status().Warnings, ""), "hide that way")
			})
			s.tellsWayBack(true)
			if n := s.Status().Permissions.Standing; n != 0 {
				t.Fatalf("%d permissions stand", n)
			}
			s.Stop()
			s.Serve("--reconcile=1s", "--inside=lan0")
			phone = s.InsideSocket(0, 5061)
			ext = s.Contact(phone, peer)
			s.Until("both flows have a permission", func() bool { return s.Status().Permissions.Standing == 2 })
			s.Arrives(phone, other, ext)
			s.tellsWayBack(false)
		})
	}
}

// Rules skip others (goto), or turn routes of a table down (suppress). They hide the way back as other
// rules do: only if they select by something that the answers alone have. The kernel applies those
// that do not when it looks up the way back, and then the flow earns a permission.
//
// Fails when the way back is looked up without such a rule, and when what one hides is left out silently.
func TestWayBackByRulesThatSkipAndSuppress(t *testing.T) {
	const other = "rule add pref 200 table 109" // by itself it leads everything to the other uplink
	for name, tc := range map[string]struct {
		commands []string
		rules    string
		hidden   bool
	}{
		"no default route counts": {[]string{other + " suppress_prefixlength 0"}, "", false},
		"no route by a group":     {[]string{"link set wan1 group 9", other + " suppress_ifgroup 9"}, "", false},
		"short prefixes count":    {[]string{other, "rule add pref 100 table main suppress_prefixlength 23"}, "", false},
		"skipped for the hosts":   {[]string{other, "rule add pref 100 to 10.47.11.0/24 goto 32766", "rule add pref 101 from 10.47.11.0/24 goto 32766"}, "", false},
		"skipped by each link":    {[]string{other, "rule add pref 100 iif wan0 goto 32766", "rule add pref 101 iif lan0 goto 32766"}, "", true},
		"skipped by port":         {[]string{other, "rule add pref 100 ipproto udp dport 5060 goto 32766"}, "", true},
		"skipped by mark": {
			[]string{other, "rule add pref 100 fwmark 9 goto 32766"},
			`table ip m { chain c { type filter hook prerouting priority mangle; iifname { wan0, wan1 } meta mark set 9; }; }`, true,
		},
		"suppressed by each link": {[]string{"rule add pref 100 iif lo table 109", "rule add pref 101 iif lan0 table main suppress_prefixlength 23"}, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks + tc.rules})
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			for _, c := range tc.commands {
				s.IP(s.Gateway, c)
			}
			phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
			s.Serve("--reconcile=1h")
			ext := s.Contact(phone, peer)
			if tc.hidden {
				s.Until("status tells of it", func() bool {
					return strings.Contains(strings.Join(s.Status().Warnings, ""), "hide that way")
				})
				s.tellsWayBack(true)
				return
			}
			s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
			s.Arrives(phone, other, ext)
			s.tellsWayBack(false)
		})
	}
}

// tellsWayBack checks whether status has the finding way_back_unknown.
func (s *scene) tellsWayBack(want bool) {
	s.T.Helper()
	told := false
	for _, f := range s.Status().Findings {
		told = told || f.ID == "way_back_unknown"
	}
	if told != want {
		s.T.Errorf("way_back_unknown is told: %v, want %v", told, want)
	}
}

// The programs of the user as whom the daemon runs shall use another uplink. That says nothing about
// packets of inside hosts and of peers, which belong to nobody: the daemon judges the user's firewall
// by the link that leads to the hosts, and ends flows whose source is wrong after a failover.
//
// Fails when the daemon asks the kernel for its own ways.
func TestNFTRoutingRuleForTheDaemonsUser(t *testing.T) {
	s, second := twoUplinks(t, lab.Options{Rules: `table ip nat { chain postrouting { type nat hook postrouting priority srcnat
	oifname wan0 snat to 198.51.100.1
	oifname wan1 snat to 198.51.100.129
}; }
` + lab.DropPolicy})
	s.Must(s.NFT(`add rule inet filter forward oifname "lan0" ct status dnat accept`))
	s.IP(s.Gateway, "route add unreachable default table 109")
	s.IP(s.Gateway, "rule add uidrange 65534-65534 table 109")
	s.Exe = s.unprivileged("0")
	s.Serve(heal, "--reconcile=1s")
	s.privileges("Uid:\t65534")
	if why := s.carried("nft"); why != "dnat_accepted" {
		t.Errorf("because %q", why)
	}
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 7000), ext)
	s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan1 onlink")
	s.heals(phone, peer, second)
}
