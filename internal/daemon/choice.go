package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/evidence"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/userrules"
)

// accept is the advice for a firewall that lets no child pass.
const accept = "let it accept UDP flows with 'ct status dnat' (iptables: -p udp -m conntrack --ctstate DNAT -j ACCEPT), which serves both kinds of children"

// acceptLabel is what nftables can accept instead where the map labels what it admits, as the line
// of doctor does.
const acceptLabel = ", or in nftables those with 'ct label 126', which only children of the map have"

// acceptUntranslated is the same for a subnet that is not translated: its children are not
// DNATed.
const acceptUntranslated = "let it accept 'ct state related' (iptables: -m conntrack --ctstate RELATED -j ACCEPT)"

// acceptNew and acceptUDP are the advice for chains of prerouting that cannot tell children from
// other packets.
const (
	acceptNew = "there, before NAT, nothing tells what the map admits from other new flows: let it accept new UDP flows to ports of inside hosts"
	acceptUDP = "there, before conntrack, nothing tells flows of peers from others: let it accept UDP to ports of inside hosts"
)

// advice says what the chain that drops children should accept. expected says that expectations
// can admit them, alone that nothing else can.
func (d *decision) advice(expected, alone bool) string {
	at := d.Dropper().At
	switch {
	case at == userrules.BeforeConntrack:
		return acceptUDP
	case alone, at == userrules.BeforeNAT && expected:
		return acceptUntranslated
	case at == userrules.BeforeNAT:
		return acceptNew
	case d.labelled:
		return accept + acceptLabel
	}
	return accept
}

// A decision says which carrier the permissions of a subnet use if both could carry
// them, and why.
type decision struct {
	cone.Choice
	userrules.ChildVerdicts
	why      why
	err      error // why the rules could not be read
	evidence []control.Evidence
	warning  string            // for the user, if there is something for him to do
	labelled bool              // the map admits children, and labels them
	zoned    bool              // the warning is about conntrack zones
	mapLost  bool              // children of the map are dropped, though expectations carry the subnet
	shut     []cone.Shut       // what the firewall drops of forwards of the user's to its hosts
	spared   []netip.Prefix    // peer groups whose children pass all the same, as far as is known
	blocker  userrules.Blocker // of all that its hosts send outside
	noNAT    bool              // no rule translates what they send
	// elsewhere says that children are lost though the chains that are read accept most of them.
	elsewhere bool
}

// related reports whether only children that an expectation made RELATED get through.
func (d *decision) related() bool {
	return d.Choice != cone.ChooseMap && d.MostDNATed == userrules.Dropped
}

// chain names the chain that drops flows, if why says that one does.
func (d *decision) chain() userrules.Dropper {
	switch d.why {
	case relatedAccepted, bothDropped, dnatDropped, relatedDropped:
		return d.Dropper()
	}
	return d.blamed()
}

// blamed names the chain that drops flows if the user is warned of it, whatever why says.
func (d *decision) blamed() userrules.Dropper {
	if d.warning == "" {
		return userrules.Dropper{}
	}
	return d.Dropper()
}

// blocked is what status shows of the blocker.
func (d decision) blocked() control.Blocked {
	switch {
	case d.blocker.Chain == "":
		return control.Blocked{}
	case d.blocker.Forward:
		return control.Blocked{Chain: d.blocker.Chain, Hook: "forward"}
	}
	return control.Blocked{Chain: d.blocker.Chain, Hook: "prerouting"}
}

// A why is the identifier (docs/control.md) of the reason for a decision.
type why string

const (
	dnatAccepted    why = "dnat_accepted"
	relatedAccepted why = "related_accepted" // and DNATed flows are dropped
	bothDropped     why = "both_dropped"
	dnatDropped     why = "dnat_dropped"
	relatedDropped  why = "related_dropped"
	cannotTell      why = "cannot_tell"
	cannotRead      why = "unread"
	notMappable     why = "not_mappable" // routed, or IPv6
	onlyMap         why = "only_map"     // open to everybody, while DNATed flows may be dropped
	onlyBackend     why = "only_backend"
)

// decide returns what carries the permissions of each subnet, judging by what the user's chains
// of the prerouting and forward hooks do with children.
func (f *firewall) decide(cfg config.Config, network gateway.Network) map[netip.Prefix]decision {
	verdicts, blockers := make([]userrules.ChildVerdicts, len(cfg.Subnets)), make([]userrules.Blocker, len(cfg.Subnets))
	q, unread := f.children(network, prefixes(cfg.Subnets))
	if unread == nil && len(q.outside) > 0 {
		var found []userrules.ChildVerdicts
		if found, unread = q.of(netip.Prefix{}); unread == nil {
			verdicts = found
		}
		if found, err := q.blockers(); err == nil && !f.withVRF { // a VRF takes the place of its links
			blockers = found
		}
	}
	shut, plain := f.shutTo(cfg, network), f.neverTranslated(cfg)
	all := make(map[netip.Prefix]decision, len(verdicts))
	for i, v := range verdicts {
		s := cfg.Subnets[i]
		w := f.witness(s.Prefix)
		if unread == nil {
			w.mapped.AcceptedNow(v.MostDNATed == userrules.Accepted)
			w.related.AcceptedNow(v.MostRelated == userrules.Accepted)
		}
		d := w.weigh(v)
		if s.Filtering == config.EndpointIndependent && d.Choice != cone.ChooseMap {
			d.Choice, d.why = cone.ChooseMap, onlyMap
		}
		if unread != nil {
			d.why, d.err, d.evidence = cannotRead, unread, nil
		}
		d.labelled = f.labelsChildren()
		d.warning, d.zoned = f.warning(cfg, s, d)
		d.mapLost = d.warning == "" && d.related() && f.withMap && s.Prefix.Addr().Is4() && s.Filtering == config.AddressDependent
		if d.MostDNATed == userrules.Dropped && v.DNATed != userrules.Dropped && s.Prefix.Addr().Is4() && len(q.inside) > 0 {
			d.spared = q.only(i).spared(largeGroups(cfg), v.MostDNATed)
		}
		d.shut = slices.DeleteFunc(slices.Clone(shut), func(x cone.Shut) bool { return !s.Prefix.Overlaps(x.Hosts) })
		d.blocker, d.noNAT = blockers[i], slices.Contains(plain, s.Prefix)
		all[s.Prefix] = d
	}
	return all
}

// shutTo returns what the user's firewall drops of flows that the user forwards to inside hosts, as it
// often is with 1:1 NAT. As forwards do, the last answer holds while the rules cannot be read; and while
// they are the same, since the walks through the chains are long.
func (f *firewall) shutTo(cfg config.Config, network gateway.Network) []cone.Shut {
	hosts := reachedIn(prefixes(cfg.Subnets), f.reached)
	if !f.withExpectations() || len(hosts) == 0 {
		f.shut = nil
		return nil
	}
	q, err := f.children(network, hosts)
	if err != nil || q.same(f.shutAsked) {
		return f.shut
	}
	var shut []cone.Shut
	if len(q.outside) > 0 {
		shut, err = q.Shut(q.outside, q.inside, hosts)
	}
	if err == nil {
		f.shut, f.shutAsked = shut, q
	}
	return f.shut
}

// translated reports whether the map can carry the subnet's permissions.
func translated(s config.Subnet) bool { return !s.Routed && s.Prefix.Addr().Is4() }

// weigh decides by the rules. It decides by evidence, that is, by what became of children into
// the subnet, if the answer of the rules is unknown, or if children are lost although the
// chains that are read accept most of them.
func (w *witnesses) weigh(v userrules.ChildVerdicts) decision {
	elsewhere := false
	answer := func(a *userrules.Answer, w *evidence.Witness, by cone.Carriers) []control.Evidence {
		pass, known := w.Passes()
		switch {
		case *a == userrules.Unknown && known && pass:
			*a = userrules.Accepted
		case *a == userrules.Unknown && known:
			*a = userrules.Dropped
		case *a == userrules.Accepted && w.Contradicts():
			*a, elsewhere = userrules.Dropped, true
		default:
			return nil
		}
		return []control.Evidence{{By: by.String(), Children: w.Judged(), Passed: w.Through()}}
	}
	evidence := answer(&v.MostDNATed, &w.mapped, cone.ByMap)
	if e := answer(&v.MostRelated, &w.related, cone.ByExpectation); v.MostDNATed != userrules.Accepted {
		evidence = append(evidence, e...)
	}
	d := choose(v)
	d.evidence, d.elsewhere = evidence, elsewhere
	return d
}

// choose decides by what the user's chains do with most children.
func choose(v userrules.ChildVerdicts) decision {
	d := decision{ChildVerdicts: v}
	dnated, related := v.MostDNATed, v.MostRelated
	switch {
	case dnated == userrules.Accepted:
		d.Choice, d.why = cone.ChooseMap, dnatAccepted
	case dnated == userrules.Dropped && related == userrules.Accepted:
		d.Choice, d.why = withExpectation(v), relatedAccepted
	case dnated == userrules.Dropped && related == userrules.Dropped:
		d.Choice, d.why = cone.ChooseMap, bothDropped
	case dnated == userrules.Dropped:
		d.Choice, d.why = withExpectation(v), dnatDropped
	case related == userrules.Dropped:
		d.Choice, d.why = cone.ChooseMap, relatedDropped
	default:
		d.Choice, d.why = cone.ChooseBoth, cannotTell
	}
	return d
}

// withExpectation returns the choice where the user's chains drop what the map alone admits. Before
// NAT they drop it as a new flow: an expectation must translate it earlier.
func withExpectation(v userrules.ChildVerdicts) cone.Choice {
	if v.DNATedBy.Chain != "" && v.DNATedBy.At != userrules.BehindNAT {
		return cone.ChooseExpectation
	}
	return cone.ChooseBoth
}

// dropper names what drops children.
func (d *decision) dropper() string {
	if d.elsewhere {
		return "a chain of another hook than prerouting and forward, or a rule for some of them"
	}
	return cmp.Or(d.Dropper().Chain, "a rule that conenatd cannot judge")
}

// warning says what the user has to do about children that are dropped, and whether
// conntrack zones are the reason.
func (f *firewall) warning(cfg config.Config, s config.Subnet, d decision) (text string, zoned bool) {
	const inZone = "packets from outside come in another conntrack zone than answers do, where no expectation stands"
	expected := f.withExpectations() && (!f.withMap || !translated(s) || d.related())
	open := s.Filtering == config.EndpointIndependent && translated(s) // only the map can admit everybody
	accept := d.advice(f.withExpectations() && !open && !f.zoned.Lately, !translated(s))
	switch {
	case s.Filtering == config.AddressAndPortDependent: // there are no permissions
		return "", false
	case f.zoned.Lately && expected && f.withMap && translated(s):
		return fmt.Sprintf("%s, and %s drops what the map admits into subnet %v: %s", inZone, d.dropper(), s.Prefix, accept), true
	case f.unexpected.Lately && expected && !f.withMap && translated(s):
		text := fmt.Sprintf("%s: what peers send there into subnet %v is lost, since only the map can admit it", inZone, s.Prefix)
		if cfg.Backend == config.BackendExpect {
			text += `; set backend = "auto"`
		}
		return text, true
	case f.unexpected.Lately && expected && (s.Routed || s.Prefix.Addr().Is6() && slices.ContainsFunc(f.zones.Outside, netip.Addr.Is6)):
		return fmt.Sprintf("%s: what peers send there into subnet %v is lost; let rules of yours give its flows no zone, or the same one in both directions (ct zone set)",
			inZone, s.Prefix), true
	case expected && d.MostRelated == userrules.Dropped, !expected && d.MostDNATed == userrules.Dropped && d.MostRelated == userrules.Dropped:
	case !expected && d.MostDNATed == userrules.Dropped:
		switch {
		case open:
			accept = `only the map can admit everybody (filtering endpoint_independent); ` + accept
		case cfg.Backend == config.BackendNFT && len(largeGroups(cfg)) == 0:
			accept += `, or set backend = "auto"`
		}
	default:
		return "", false
	}
	return fmt.Sprintf("your firewall drops the flows of peers into subnet %v: %s; %s", s.Prefix, d.dropper(), accept), false
}

// redecide decides again, and moves what stands to the carriers chosen.
func (r *reconciler) redecide(cfg config.Config, network gateway.Network) error {
	ok := r.ask(func(l *loop) {
		if n, err := r.conntrack.Read(handover.Events); err == nil && n == 0 { // no event shows which children pass
			r.firewall.witnesses = nil
		} else {
			r.firewall.readEvidence(r.now(), cfg.Subnets, l.engine.Model.PassedInto)
		}
		r.firewall.noteZoned(r.now())
	})
	if !ok {
		return errEnded
	}
	all := r.firewall.decide(cfg, network)
	changed := !maps.EqualFunc(all, r.firewall.decisions, func(a, b decision) bool { return a.Choice == b.Choice && slices.Equal(a.shut, b.shut) })
	r.firewall.decisions = all
	ok = r.ask(func(l *loop) {
		news := slices.DeleteFunc(slices.Clone(cfg.Subnets), func(s config.Subnet) bool {
			x, decided := all[s.Prefix]
			old, known := l.decisions[s.Prefix]
			return !decided || known && old.Choice == x.Choice && old.ChildVerdicts == x.ChildVerdicts
		})
		l.decisions = all
		l.tellCarriers(r.log, news)
		l.warned.Tell(r.now(), l.warnings())
		if changed {
			l.engine.Model.SetPolicy(r.now(), l.policy(l.cfg))
		}
	})
	if !ok {
		return errEnded
	}
	if !changed {
		return nil
	}
	_, err := r.firewall.set(cfg, network.OutsideLinks()) // the kernel learns for other subnets now
	if r.firewall.tables != nil {
		own, failed := r.firewall.tables.Changed() // else our own change would look like somebody else's
		r.changed.rules, err = r.changed.rules || own, errors.Join(err, failed)
	}
	r.wantReconcile() // to find the flows that give other permissions now
	return err
}

// tellCarriers logs what carries the permissions of subnets, and why: a line for all that have
// the same.
func (l *loop) tellCarriers(log *slog.Logger, subnets []config.Subnet) {
	var texts []string
	of := make(map[string][]netip.Prefix)
	for _, s := range subnets {
		text := l.carried(s).Text()
		if of[text] == nil {
			texts = append(texts, text)
		}
		of[text] = append(of[text], s.Prefix)
	}
	for _, text := range texts {
		log.Info("permissions are carried by "+text, "subnets", of[text])
	}
}

// carriers are what carries the permissions of a subnet.
func (l *loop) carriers(c cone.Choice) cone.Carriers {
	by := l.backends.carriers().Carriers()
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

// carried says what carries the permissions of a subnet, and why.
func (l *loop) carried(s config.Subnet) control.Carried {
	x, known := l.decisions[s.Prefix]
	switch {
	case !translated(s):
		return carriedBy(cone.ByExpectation.String(), notMappable, x.blamed())
	case l.backends.carriers().Carriers() != cone.AllCarriers || !known:
		return carriedBy(l.backends.String(), onlyBackend, x.blamed())
	}
	c := carriedBy(l.carriers(x.Choice).String(), x.why, x.chain())
	c.Evidence = x.evidence
	if x.err != nil {
		c.Error = x.err.Error()
	}
	return c
}

func carriedBy(by string, why why, dropper userrules.Dropper) control.Carried {
	before := map[userrules.Place]string{userrules.BeforeNAT: control.BeforeNAT, userrules.BeforeConntrack: control.BeforeConntrack}
	return control.Carried{By: by, Why: string(why), Chain: dropper.Chain, Before: before[dropper.At]}
}
