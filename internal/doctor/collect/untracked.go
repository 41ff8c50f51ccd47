package collect

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// sides returns the subnets of st with the links inside that lead to them, and the outside links.
func sides(st control.Status, network gateway.Network, inside []gateway.Link) (s userrules.Sides) {
	s.Subnets = control.Prefixes(st.Subnets)
	for _, l := range network.Links {
		if slices.Contains(st.Outside, l.Name) {
			s.Outside = append(s.Outside, userrules.Link{Index: l.Index, Name: l.Name})
		}
	}
	for _, l := range inside {
		if l.Name != "" {
			s.Inside = append(s.Inside, userrules.Link{Index: l.Index, Name: l.Name})
		}
	}
	return s
}

// untracked finds the rules that keep packets from conntrack, but for those to peer ports that give no
// permission (exclude_peer_ports): such a rule is for a resolver or a clock on the gateway.
func untracked(rs *userrules.Ruleset, st control.Status, sides userrules.Sides) (all []doctor.Untracked) {
	var routed []netip.Prefix
	for _, s := range st.Subnets {
		if s.Routed {
			routed = append(routed, s.Prefix)
		}
	}
	for _, u := range rs.Untracked(sides, routed) {
		var ports []string
		wanted := u.FromPeers
		for _, r := range u.Ports {
			ports = append(ports, r.Text())
			wanted = wanted || !excluded(st, r)
		}
		x := doctor.Untracked{Subnets: []netip.Prefix{u.Subnet}, FromPeers: u.FromPeers, Rule: u.Text, Spec: u.Spec}
		switch text := strings.Join(ports, ", "); {
		case text == "0-65535":
		case strings.ContainsAny(text, ",-"):
			x.Ports = "ports " + text
		default:
			x.Ports = "port " + text
		}
		same := func(o doctor.Untracked) bool {
			return o.Rule == x.Rule && o.FromPeers == x.FromPeers && o.Ports == x.Ports
		}
		switch i := slices.IndexFunc(all, same); {
		case !wanted:
		case i >= 0:
			all[i].Subnets = append(all[i].Subnets, u.Subnet)
		default:
			all = append(all, x)
		}
	}
	return all
}

// excluded reports whether no peer port of r gives a permission.
func excluded(st control.Status, r cone.PortRange) bool {
	next := int(r.First)
	for _, x := range st.ExcludePeerPorts { // sorted
		if int(x.First) <= next && next <= int(x.Last) {
			next = int(x.Last) + 1
		}
	}
	return next > int(r.Last)
}
