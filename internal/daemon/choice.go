package daemon

import (
	"cmp"
	"fmt"
	"maps"
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
)

// accept is what to do about a firewall that lets no child pass.
const accept = "let it accept 'ct status dnat' (iptables: -m conntrack --ctstate DNAT -j ACCEPT), which serves both kinds of children"

// A decision says what carries the permissions of a subnet that both carriers could,
// and why.
type decision struct {
	cone.Choice
	rules.ChildVerdicts
	why     string
	warning string // for the user, if there is something for him to do
}

// decide says what carries the permissions of each subnet: what the user's forward
// hook does with children tells, as far as its rules are understood.
func (f *firewall) decide(cfg config.Config, network gateway.Network) map[netip.Prefix]decision {
	verdicts := make([]rules.ChildVerdicts, len(cfg.Subnets))
	unread := ""
	if links := outsideLinks(network); f.tables != nil && len(links) > 0 {
		found, err := rules.Children(0, links, prefixes(cfg.Subnets))
		if err == nil {
			verdicts = found
		} else {
			unread = fmt.Sprintf("your forward chains cannot be read (%v)", err)
		}
	}
	all := make(map[netip.Prefix]decision, len(verdicts))
	for i, v := range verdicts {
		s := cfg.Subnets[i]
		d := f.weigh(v)
		if unread != "" {
			d.why = unread
		}
		d.warning = f.warning(s, d)
		all[s.Prefix] = d
	}
	return all
}

// weigh decides with what became of children where the rules do not tell.
func (f *firewall) weigh(v rules.ChildVerdicts) decision {
	answer := func(a *rules.Answer, w *witness) string {
		pass, known := w.passes()
		switch {
		case *a != rules.Unknown || !known:
			return ""
		case pass:
			*a = rules.Accepted
		default:
			*a = rules.Dropped
		}
		return fmt.Sprintf("; of the last %d children that came so it let %d pass", w.lately, w.through)
	}
	evidence := answer(&v.MostDNATed, &f.mapped)
	if e := answer(&v.MostRelated, &f.related); v.MostDNATed != rules.Accepted {
		evidence += e
	}
	d := choose(v)
	d.why += evidence
	return d
}

// choose decides by what the forward hook does with most children.
func choose(v rules.ChildVerdicts) decision {
	v.Dropper = cmp.Or(v.Dropper, "the forward chain")
	d := decision{ChildVerdicts: v}
	dnated, related := v.MostDNATed, v.MostRelated
	switch {
	case dnated == rules.Accepted:
		d.Choice, d.why = cone.ChooseMap, "your firewall accepts flows with ct status dnat"
	case dnated == rules.Dropped && related == rules.Accepted:
		d.Choice, d.why = cone.ChooseExpectation, v.Dropper+" drops DNATed flows and accepts RELATED"
	case dnated == rules.Dropped && related == rules.Dropped:
		d.Choice, d.why = cone.ChooseMap, "neither gets through: "+v.Dropper+" drops DNATed and RELATED flows"
	case dnated == rules.Dropped:
		d.Choice, d.why = cone.ChooseExpectation, v.Dropper+" drops DNATed flows"
	case related == rules.Dropped:
		d.Choice, d.why = cone.ChooseMap, v.Dropper+" drops RELATED flows"
	default:
		d.Choice, d.why = cone.ChooseBoth, "whether your firewall accepts DNATed flows cannot be told from its rules"
	}
	return d
}

// warning says what the user has to do about children that get nowhere.
func (f *firewall) warning(s config.Subnet, d decision) string {
	expected := f.withExpectations() && (!f.withMap || s.Routed || s.Prefix.Addr().Is6() || d.Choice == cone.ChooseExpectation)
	switch {
	case expected && d.MostRelated == rules.Dropped, !expected && d.MostDNATed == rules.Dropped && d.MostRelated == rules.Dropped:
		return fmt.Sprintf("your firewall drops the flows of peers into subnet %v: %s; %s", s.Prefix, d.Dropper, accept)
	case !expected && d.MostDNATed == rules.Dropped:
		return fmt.Sprintf("your firewall drops the flows of peers into subnet %v: %s; %s, or set backend = \"auto\"", s.Prefix, d.Dropper, accept)
	}
	return ""
}

// redecide decides anew and lets what stands follow. The reconcile calls it.
func (d *Daemon) redecide(cfg config.Config, network gateway.Network, tables control.Tables) error {
	ok := d.ask(func() {
		s := d.model.Stats()
		d.firewall.mapped.read(d.now(), tables.Map.Admitted, s.Passed)
		d.firewall.related.read(d.now(), tables.Expected.Admitted, s.Through)
	})
	if !ok {
		return errEnded
	}
	all := d.firewall.decide(cfg, network)
	changed := !maps.EqualFunc(all, d.firewall.decisions, func(a, b decision) bool { return a.Choice == b.Choice })
	d.firewall.decisions = all
	ok = d.ask(func() {
		for prefix, x := range all {
			if old, known := d.decisions[prefix]; !known || old.Choice != x.Choice || old.ChildVerdicts != x.ChildVerdicts {
				d.log.Info("what carries permissions", "subnet", prefix, "by", d.carriers(x.Choice), "why", x.why)
			}
		}
		d.decisions = all
		d.warned.tell(d.now(), d.warnings())
		if changed {
			d.model.SetPolicy(d.now(), d.policy(d.cfg.Config))
		}
	})
	if !ok {
		return errEnded
	}
	if !changed {
		return nil
	}
	_, err := d.firewall.set(cfg, network.OutsideLinks()) // the kernel learns for others
	d.wantReconcile()                                     // to find the flows that give other permissions now
	return err
}

// carriers are what carries the permissions of a subnet.
func (d *Daemon) carriers(c cone.Choice) cone.Carriers {
	by := d.backends.carriers()
	if by == cone.AllCarriers {
		switch c {
		case cone.ChooseMap:
			by = cone.ByMap
		case cone.ChooseExpectation:
			by = cone.ByExpectation
		}
	}
	return by
}

// carried says in words what carries the permissions of a subnet, and why.
func (d *Daemon) carried(s config.Subnet) string {
	x, known := d.decisions[s.Prefix]
	switch {
	case s.Routed || s.Prefix.Addr().Is6():
		return "expect: it is routed or of IPv6"
	case d.backends.carriers() != cone.AllCarriers || !known:
		return fmt.Sprintf("%v: no other backend is in use", d.backends)
	}
	return fmt.Sprintf("%v: %s", d.carriers(x.Choice), x.why)
}
