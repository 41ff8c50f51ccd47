package daemon

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Permissions that only the map can carry, where the user's firewall drops what it admits.

// largeGroups returns the peer groups that only the map can admit.
func largeGroups(cfg config.Config) (all []netip.Prefix) {
	for _, g := range cfg.PeerGroups {
		if g.Addr().Is4() && g.Bits() < 32-cone.ExpandBits {
			all = append(all, g)
		}
	}
	return all
}

// lost says why no child gets in by a permission that stands, if it is treated like most:
// the user's firewall drops it, or it comes in a conntrack zone without expectations. If a forward
// of the user's leads to the host, peers get in by that.
func (d *decision) lost(v *cone.View) cone.Reason {
	switch {
	case d.zoned && v.By == cone.ByExpectation:
		return cone.ReasonOtherZone
	case d.drops(v) && v.Why == cone.ReasonForwardedHere:
		return v.Why
	case d.drops(v):
		return cone.ReasonDropped
	}
	return cone.ReasonNone
}

func (d *decision) drops(v *cone.View) bool {
	mapped := d.MostDNATed == userrules.Dropped && !slices.Contains(d.spared, v.Peers())
	related := d.MostRelated == userrules.Dropped
	switch v.By {
	case cone.ByMap:
		return mapped
	case cone.ByExpectation:
		return related
	}
	return v.By != 0 && mapped && related
}

// addMapLost warns of permissions of a subnet that expectations cannot carry: the user's
// firewall drops what the map admits. alone counts those that stand, as Model.MapAlone. It leaves out
// those of hosts to which the user forwards their ports: they are reached by that.
func (w *warnings) addMapLost(cfg config.Config, s config.Subnet, d *decision, alone [cone.Reasons]int) {
	if !d.mapLost {
		return
	}
	add := func(about, which, why string) {
		w.add(warnChildrenDropped, fmt.Sprintf("%v %s", s.Prefix, about),
			"your firewall drops the flows of peers into subnet %v where only the map can admit them (%s): %s; %s%s", s.Prefix, which, d.dropper(), why, d.advice(false, false))
	}
	var groups []string
	for _, g := range largeGroups(cfg) {
		if !slices.Contains(d.spared, g) {
			groups = append(groups, g.String())
		}
	}
	// Of a routed subnet the map carries only what is translated all the same.
	if len(groups) > 0 && (translated(s) || alone[cone.ReasonNone] > 0) {
		add("peer_groups", "peer group "+strings.Join(groups, " and "), "an expectation admits one peer, so that groups of more than 16 need the map; ")
	}
	for r, n := range alone {
		if r := cone.Reason(r); n > 0 && r != cone.ReasonNone && r != cone.ReasonForwardedHere {
			add(r.String(), control.Words(r.String()), fmt.Sprintf("permissions without an expectation: %d; ", n))
		}
	}
}
