package cone

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
)

// wildPolicy has a group of peers, and a host for each kind of filtering.
func wildPolicy(p *Policy) {
	p.Mapped = true
	p.PeerGroups = []netip.Prefix{netip.MustParsePrefix("203.0.113.4/30"), netip.MustParsePrefix("2001:db8:113::/64")}
	p.Subnets = []Subnet{
		{Prefix: netip.MustParsePrefix("10.47.11.110/32"), Filtering: EndpointIndependent},
		{Prefix: netip.MustParsePrefix("10.47.11.111/32"), Filtering: AddressAndPortDependent},
		{Prefix: netip.MustParsePrefix("10.47.11.0/24")},
		{Prefix: netip.MustParsePrefix("2001:db8:47::109/128"), Routed: true, Filtering: EndpointIndependent},
		{Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true},
	}
}

func TestPeersOfAPermission(t *testing.T) {
	const expand = "203.0.113.4/32 203.0.113.5/32 203.0.113.6/32 203.0.113.7/32"
	for name, tc := range map[string]struct {
		in, peer string
		mapped   bool
		want     string // for each permission
	}{
		"one peer":                          {"10.47.11.109:1", "192.0.2.9:9", true, "192.0.2.9/32"},
		"a peer of the group":               {"10.47.11.109:1", "203.0.113.6:9", true, "203.0.113.4/30"},
		"everybody":                         {"10.47.11.110:1", "192.0.2.9:9", true, "0.0.0.0/0"},
		"everybody, a group or not":         {"10.47.11.110:1", "203.0.113.6:9", true, "0.0.0.0/0"},
		"nobody":                            {"10.47.11.111:1", "203.0.113.6:9", true, ""},
		"a group that no backend carries":   {"10.47.11.109:1", "203.0.113.6:9", false, expand},
		"everybody, and no backend carries": {"10.47.11.110:1", "203.0.113.6:9", false, expand},
		"the same, and no group":            {"10.47.11.110:1", "192.0.2.9:9", false, "192.0.2.9/32"},
		"IPv6, one peer":                    {"[2001:db8:47::110]:1", "[2001:db8:99::9]:9", false, "2001:db8:99::9/128"},
		"IPv6, a peer of the group":         {"[2001:db8:47::110]:1", "[2001:db8:113::9]:9", false, "2001:db8:113::/64"},
		"IPv6, everybody":                   {"[2001:db8:47::109]:1", "[2001:db8:113::9]:9", true, "::/0"},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { wildPolicy(p); p.Mapped = tc.mapped })
			top := testTopology
			top.Routes = append(top.Routes, Route{Prefix: netip.MustParsePrefix("::/0"), Outside: true})
			d.m.SetTopology(0, top)
			in, peer := ep(tc.in), ep(tc.peer)
			f := &Flow{ID: 1, Src: in, Dst: peer, ReplySrc: peer, ReplyDst: in}
			if in.Addr.Is4() {
				f.Status, f.ReplyDst = StatusSrcNAT, ep("198.51.100.1:1")
			}
			d.seen(0, f)
			var got []string
			for k := range d.up {
				got = append(got, k.Peers().String())
			}
			slices.Sort(got)
			if want := strings.Fields(tc.want); !slices.Equal(got, want) {
				t.Errorf("permissions for %q, want %q", got, tc.want)
			}
			if tc.want == "" && d.m.Stats().Skipped[ReasonFiltering] != 1 {
				t.Errorf("skipped %v", d.m.Stats().Skipped)
			}
		})
	}
}

// Two peers of a group use the same port.
func TestFlowsOfAGroupAreToldApart(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	d := newDesk(t, func(p *Policy) { wildPolicy(p); p.Limits.Children = 1 })
	one, two := d.open(0, in, "203.0.113.5:9"), d.open(0, in, "203.0.113.6:9")
	a, _ := d.admit(1, "203.0.113.5:77", ext, in, 0)
	b, _ := d.admit(1, "203.0.113.6:77", ext, in, 0)
	if v := d.view(in); v.Flows != 2 || v.Children != 2 {
		t.Errorf("%d flows, %d children; want 2, 2", v.Flows, v.Children)
	}
	d.gone(2, one)
	d.gone(2, a)
	if v := d.view(in); v.Flows != 1 || v.Children != 1 {
		t.Errorf("%d flows, %d children are left; want 1, 1", v.Flows, v.Children)
	}

	// The model queries the right flows.
	d.m.Tick(2+lifetime, 10)
	d.ops = nil
	d.carry()
	var asked []Endpoint
	for _, o := range d.ops {
		if o.Kind == Query {
			src, _ := o.FlowTuple()
			asked = append(asked, src)
			d.m.FlowMissing(2+lifetime, &o)
		}
	}
	if !slices.Contains(asked, two.ReplySrc) || !slices.Contains(asked, b.Src) || len(asked) != 2 {
		t.Errorf("asked for %v, want %v and %v", asked, two.ReplySrc, b.Src)
	}
	if len(d.m.flows.peers) != 0 || d.m.flows.byKey.len() != 0 {
		t.Errorf("left: %v, %v", d.m.flows.peers, d.m.flows.byKey.len())
	}

	// A group may have more children than a single peer.
	for i := range GroupChildren + 1 {
		from := Endpoint{ep("203.0.113.5:1").Addr, uint16(1000 + i)}.String()
		if i == 0 {
			d.open(3+2*lifetime, in, "203.0.113.5:9")
		}
		_, kinds := d.admit(3+2*lifetime, from, ext, in, 0)
		if slices.Contains(kinds, DropUnanswered) != (i == GroupChildren) {
			t.Errorf("child %d: ops %v", i, kinds)
		}
	}
}

func TestEarlyPacketsOfAllPeersGo(t *testing.T) {
	for name, tc := range map[string]struct {
		in, from string
		goes     bool
	}{
		"of the group":     {"10.47.11.109:1", "203.0.113.7:77", true},
		"of another peer":  {"10.47.11.109:1", "203.0.113.8:77", false},
		"of just anybody":  {"10.47.11.110:1", "192.0.2.99:77", true},
		"another endpoint": {"10.47.11.110:2", "192.0.2.99:77", false},
	} {
		for order, first := range map[string]bool{"packet first": true, "permission first": false} {
			t.Run(name+", "+order, func(t *testing.T) {
				d := newDesk(t, wildPolicy)
				early := &Flow{ID: 1000, Src: ep(tc.from), Dst: ep("198.51.100.1:1"), ReplySrc: ep("198.51.100.1:1"), ReplyDst: ep(tc.from)}
				if first {
					d.seen(0, early)
				}
				d.open(1, tc.in, "203.0.113.5:9")
				if !first {
					d.seen(2, early)
				}
				var gone []Endpoint
				for _, o := range d.ops {
					if o.Kind == DropEarly {
						src, _ := o.FlowTuple()
						gone = append(gone, src)
					}
				}
				if slices.Contains(gone, early.Src) != tc.goes || len(gone) > 1 {
					t.Errorf("dropped %v, want the flow from %v dropped: %v", gone, early.Src, tc.goes)
				}
			})
		}
	}
}

// If only an answered child holds a permission, no flow would bring it back. Fails when
// SetPolicy or Adopt does not carry it on.
func TestPermissionWithoutItsFlowIsWidened(t *testing.T) {
	const in, ext = "10.47.11.109:1", "198.51.100.1:1"
	wide := testPolicy
	wildPolicy(&wide)
	want := func(t *testing.T, d *desk, hostBits uint8) {
		t.Helper()
		d.carry()
		d.want(in)
		if v := d.view(in); v.HostBits != hostBits {
			t.Errorf("it is for %v", v.Peers())
		}
		d.m.Tick(lifetime+1, 10)
		d.carry()
		d.want() // not a moment longer
	}
	t.Run("by a reload", func(t *testing.T) {
		d := newDesk(t, mapped)
		d.gone(0, d.open(0, in, "203.0.113.5:9"))
		d.m.SetPolicy(1, wide)
		want(t, d, 2)
	})
	t.Run("by a new daemon", func(t *testing.T) {
		d := newDesk(t, wildPolicy)
		p := Permission{Key: Key{Ext: ep(ext), Peer: ep("203.0.113.5:1").Addr}, Int: ep(in)}
		d.up[p.Key] = p.Int
		d.m.Adopt(0, p, ByMap, lifetime)
		want(t, d, 2)
	})
	t.Run("not what was revoked", func(t *testing.T) {
		d := newDesk(t, mapped)
		d.open(0, in, "203.0.113.5:9")
		d.m.Revoke(0, func(Permission) bool { return true })
		d.m.SetPolicy(1, wide)
		d.carry()
		d.want()
	})
	t.Run("as long as the one that was refreshed last", func(t *testing.T) {
		d := newDesk(t, mapped)
		d.gone(0, d.open(0, in, "203.0.113.5:9"))
		d.gone(lifetime/2, d.open(lifetime/2, in, "203.0.113.6:9"))
		d.m.SetPolicy(lifetime/2, wide)
		d.carry()
		d.m.Tick(lifetime+1, 10)
		d.carry()
		d.want(in)
	})
	excluded := netip.MustParsePrefix("203.0.113.5/32")
	for name, change := range map[string]func(*Policy){
		"not where the port is excluded": func(p *Policy) { p.ExcludePorts = []uint16{1} },
		"not where the peer is excluded": func(p *Policy) { p.ExcludePeers = []netip.Prefix{excluded} },
		"not where the peer's port is":   func(p *Policy) { p.ExcludePeerPorts = []uint16{9} },
		"not where the peer is inside":   func(p *Policy) { p.Subnets = append(p.Subnets, Subnet{Prefix: excluded}) },
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, mapped)
			f := d.open(0, in, "203.0.113.5:9")
			p := wide
			change(&p)
			if len(p.ExcludePeerPorts) == 0 {
				d.gone(0, f)
			}
			d.m.SetPolicy(1, p)
			d.carry()
			d.want()
		})
	}
}

// Without the group only the peer that was contacted may go on.
func TestSpreadPermissionsEndWithTheirGroup(t *testing.T) {
	d := newDesk(t, func(p *Policy) { wildPolicy(p); p.Mapped = false })
	const in = "10.47.11.109:1"
	out := d.open(0, in, "203.0.113.5:9")
	d.want(in, in, in, in)
	p := testPolicy
	d.m.SetPolicy(1, p)
	d.snapshot(1, out)
	d.want(in)
	if v := d.view(in); v.Peer != out.ReplySrc.Addr {
		t.Errorf("%v may send", v.Peer)
	}
	d.gone(2, out)
	d.m.Tick(2*lifetime, 10)
	d.carry()
	d.want()
}

// A permission that the new policy makes wider or narrower ends; the next snapshot brings
// it back in its new form.
func TestPolicyChangesThePeersOfPermissions(t *testing.T) {
	const in = "10.47.11.109:1"
	narrow, wide := testPolicy, testPolicy
	wildPolicy(&wide)
	narrow.Mapped = true
	d := newDesk(t, mapped)
	out := d.open(0, in, "203.0.113.5:9")
	for i, p := range []Policy{wide, narrow, wide} {
		d.m.SetPolicy(0, p)
		d.snapshot(0, out)
		d.want(in)
		wantBits := uint8(2 * ((i + 1) % 2))
		if v := d.view(in); v.HostBits != wantBits {
			t.Errorf("change %d: it is for %v", i, v.Peers())
		}
	}
	off := wide
	off.Subnets = []Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Filtering: AddressAndPortDependent}}
	d.m.SetPolicy(0, off)
	d.snapshot(0, out)
	d.want()
}

func TestWithoutClearsLowBits(t *testing.T) {
	a := AddrFrom(netip.MustParseAddr("203.0.113.255"))
	for n, want := range map[uint8]string{0: "203.0.113.255", 1: "203.0.113.254", 8: "203.0.113.0", 12: "203.0.112.0", 32: "0.0.0.0"} {
		if got := a.WithoutLow(n).String(); got != want {
			t.Errorf("without %d low bits: %s, want %s", n, got, want)
		}
	}
	if got := AddrFrom(netip.MustParseAddr("2001:db8::1")).WithoutLow(128); got != (Addr{}) {
		t.Errorf("%v, want ::", got)
	}
}
