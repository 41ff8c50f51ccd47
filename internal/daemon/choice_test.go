package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

func TestWhatTheForwardHookDoesDecides(t *testing.T) {
	pass, none, few := [2]uint64{10, 10}, [2]uint64{10, 0}, [2]uint64{2, 0}
	evidence := func(by string, passed uint64) control.Evidence {
		return control.Evidence{By: by, Children: 10, Passed: passed}
	}
	for name, tc := range map[string]struct {
		dnated, related userrules.Answer
		mapped, others  [2]uint64 // children admitted and passed, by the map and by expectations
		want            cone.Choice
		why             why
		evidence        []control.Evidence
	}{
		"both pass":                 {userrules.Accepted, userrules.Accepted, none, pass, cone.ChooseMap, dnatAccepted, nil},
		"DNATed pass":               {userrules.Accepted, userrules.Dropped, none, none, cone.ChooseMap, dnatAccepted, nil},
		"RELATED pass":              {userrules.Dropped, userrules.Accepted, pass, none, cone.ChooseBoth, relatedAccepted, nil},
		"neither passes":            {userrules.Dropped, userrules.Dropped, pass, pass, cone.ChooseMap, bothDropped, nil},
		"DNATed do not pass":        {userrules.Dropped, userrules.Unknown, pass, few, cone.ChooseBoth, dnatDropped, nil},
		"RELATED do not pass":       {userrules.Unknown, userrules.Dropped, few, pass, cone.ChooseMap, relatedDropped, nil},
		"nobody knows":              {userrules.Unknown, userrules.Unknown, few, few, cone.ChooseBoth, cannotTell, nil},
		"DNATed passed":             {userrules.Unknown, userrules.Unknown, pass, none, cone.ChooseMap, dnatAccepted, []control.Evidence{evidence("nft", 10)}},
		"DNATed were dropped":       {userrules.Unknown, userrules.Accepted, none, few, cone.ChooseBoth, relatedAccepted, []control.Evidence{evidence("nft", 0)}},
		"RELATED were dropped":      {userrules.Unknown, userrules.Unknown, few, none, cone.ChooseMap, relatedDropped, []control.Evidence{evidence("expect", 0)}},
		"both were dropped":         {userrules.Unknown, userrules.Unknown, none, none, cone.ChooseMap, bothDropped, []control.Evidence{evidence("nft", 0), evidence("expect", 0)}},
		"RELATED passed, no others": {userrules.Unknown, userrules.Unknown, few, pass, cone.ChooseBoth, cannotTell, []control.Evidence{evidence("expect", 10)}},
	} {
		t.Run(name, func(t *testing.T) {
			var w witnesses
			w.mapped.Read(0, 0, 0, 0)
			w.related.Read(0, 0, 0, 0)
			w.mapped.Read(1, tc.mapped[0], tc.mapped[1], tc.mapped[1])
			w.related.Read(1, tc.others[0], tc.others[1], tc.others[1])
			w.mapped.SawFlows()
			w.related.SawFlows()
			d := w.weigh(userrules.ChildVerdicts{MostDNATed: tc.dnated, MostRelated: tc.related})
			if d.Choice != tc.want || d.why != tc.why || !slices.Equal(d.evidence, tc.evidence) {
				t.Errorf("%v because %q, %+v", d.Choice, d.why, d.evidence)
			}
		})
	}
}

// A rule before NAT drops a child of the map as a new flow, whether or not an expectation of the map's
// makes it RELATED behind NAT.
//
// Fails when only where the flow is dropped behind NAT, or nobody knows where, the map leads.
func TestExpectationTranslatesWhereNewFlowsAreDroppedBeforeNAT(t *testing.T) {
	for at, want := range map[userrules.Place]cone.Choice{
		userrules.BeforeNAT: cone.ChooseExpectation, userrules.BehindNAT: cone.ChooseBoth,
	} {
		v := userrules.ChildVerdicts{MostDNATed: userrules.Dropped, MostRelated: userrules.Accepted}
		v.DNATedBy = userrules.Dropper{Chain: "c", At: at}
		if got := choose(v).Choice; got != want {
			t.Errorf("dropped at %v: %v, want %v", at, got, want)
		}
	}
}

// Children come between the reading of the kernel's counters and that of the model, as on a busy
// machine: the next counters have them, and they passed.
//
// Fails when they begin as passed, so that as many later ones seem to be lost for good.
func TestEvidenceHasNoChildrenMissingThatCameBetweenReadings(t *testing.T) {
	subnet := netip.MustParsePrefix("10.47.11.0/24")
	f := &firewall{}
	read := func(now time.Duration, before, admitted, passed uint64) {
		f.passedBefore = nil // as long as none passed
		if before > 0 {
			f.passedBefore = map[netip.Prefix]cone.Passed{subnet: {Mapped: before}}
		}
		f.counts = rules.Counters{"admitted": admitted}
		f.readEvidence(now, []config.Subnet{{Prefix: subnet}}, func(netip.Prefix) cone.Passed { return cone.Passed{Mapped: passed} })
	}
	check := func(when string) {
		t.Helper()
		if pass, known := f.witness(subnet).mapped.Passes(); !pass || !known {
			t.Errorf("%s: pass %v, known %v", when, pass, known)
		}
	}
	read(1, 0, 0, 12)
	read(2, 12, 12, 12)
	check("at the start")
	read(3, 12, 12, 24)
	f.witness(subnet).mapped.Restart() // somebody changed rules
	read(4, 24, 24, 24)
	check("after the rules changed")
	f.counting = nil // children into subnets are counted another way
	read(5, 24, 24, 84)
	read(6, 84, 84, 84)
	check("counted another way")
}

// Twelve children come at once. Nothing shows yet which of them passed, since the loop has not
// read their events. Then it reads them, or a dump of flows shows that all were lost.
//
// Fails when a child is taken for lost before flows were dumped after it came, and when children
// that are lost, or what passed at once, are not found then.
func TestChildrenAreLostOnlyAfterADump(t *testing.T) {
	subnet := netip.MustParsePrefix("10.47.11.0/24")
	for name, tc := range map[string]struct {
		late          uint64 // how many have passed at the first reading, and at the next
		passed        uint64
		first, dumped string // what is known then
	}{
		"events are late":    {0, 12, "nothing", "pass"},
		"some are late":      {2, 12, "nothing", "pass"},
		"events are in time": {12, 12, "pass", "pass"},
		"all are lost":       {0, 0, "nothing", "lost"},
	} {
		t.Run(name, func(t *testing.T) {
			f := &firewall{}
			read := func(now time.Duration, dumped bool, admitted, before, passed uint64, want string) {
				t.Helper()
				f.dumped, f.counts = dumped, rules.Counters{"admitted": admitted}
				f.passedBefore = nil // as long as none passed
				if before > 0 {
					f.passedBefore = map[netip.Prefix]cone.Passed{subnet: {Mapped: before}}
				}
				f.readEvidence(now, []config.Subnet{{Prefix: subnet}}, func(netip.Prefix) cone.Passed { return cone.Passed{Mapped: passed} })
				known := "nothing"
				if pass, yes := f.witness(subnet).mapped.Passes(); yes && pass {
					known = "pass"
				} else if yes {
					known = "lost"
				}
				if known != want {
					t.Errorf("at %v: %s, want %s", now, known, want)
				}
			}
			read(1, false, 0, 0, 0, "nothing")
			read(2, true, 12, 0, tc.late, tc.first)
			read(3, false, 12, tc.late, tc.late, tc.first) // somebody changed rules
			read(4, true, 12, tc.passed, tc.passed, tc.dumped)
			// The same number come again.
			read(5, true, 24, tc.passed, tc.passed+tc.late, tc.dumped)
			read(6, true, 24, 2*tc.passed, 2*tc.passed, tc.dumped)
		})
	}
}

// Children are lost that the rules of the forward hook accept.
//
// Fails when a single dump decides, or readings without a dump, and when a change of the rules
// does not start the evidence again.
func TestLostChildrenContradictTheRules(t *testing.T) {
	accepts := userrules.ChildVerdicts{MostDNATed: userrules.Accepted, MostRelated: userrules.Accepted}
	f := &firewall{}
	subnet := netip.MustParsePrefix("10.47.11.0/24")
	read := func(now time.Duration, admitted uint64, want cone.Choice) {
		t.Helper()
		f.dumped = now != 3
		f.counts = rules.Counters{"admitted": admitted}
		f.readEvidence(now, []config.Subnet{{Prefix: subnet}}, func(netip.Prefix) cone.Passed { return cone.Passed{} })
		d := f.witness(subnet).weigh(accepts)
		f.decisions = map[netip.Prefix]decision{subnet: d}
		if d.Choice != want || d.elsewhere != (want != cone.ChooseMap) {
			t.Errorf("at %v: %v because %q, elsewhere %v", now, d.Choice, d.why, d.elsewhere)
		}
	}
	read(0, 0, cone.ChooseMap)
	read(2, 10, cone.ChooseMap) // the dump may show them
	read(3, 10, cone.ChooseMap)
	read(5, 10, cone.ChooseBoth)
	f.retry.Changed = true
	read(6, 10, cone.ChooseMap)
	read(7, 20, cone.ChooseMap)
	read(8, 20, cone.ChooseBoth)
	f.retry.Changed = true // all the time, so it has to wait
	read(9, 20, cone.ChooseBoth)
	read(6+time.Minute, 20, cone.ChooseMap)
}

// While there are several subnets and no labels, children into each are not counted. Fails when
// those that others had lost in that time speak against a subnet once it is alone again, and
// when what was seen before no longer does.
func TestEvidenceWhenSubnetsChange(t *testing.T) {
	one, other := netip.MustParsePrefix("10.47.11.0/24"), netip.MustParsePrefix("10.47.12.0/24")
	f := &firewall{}
	read := func(now time.Duration, admitted, passed uint64, subnets ...netip.Prefix) {
		f.dumped = true
		var all []config.Subnet
		for _, p := range subnets {
			all = append(all, config.Subnet{Prefix: p})
		}
		f.counts = rules.Counters{"admitted": admitted}
		f.passedBefore = map[netip.Prefix]cone.Passed{one: {Mapped: passed}, other: {Mapped: passed}}
		f.readEvidence(now, all, func(netip.Prefix) cone.Passed { return cone.Passed{Mapped: passed} })
	}
	check := func(when string, pass, known bool) {
		t.Helper()
		if p, k := f.witness(one).mapped.Passes(); p != pass || k != known {
			t.Errorf("%s: pass %v, known %v", when, p, k)
		}
	}
	read(0, 0, 0, one)
	read(1, 10, 10, one)
	check("all pass", true, true)
	read(2, 10, 10, one, other)
	read(3, 60, 10, one, other)
	read(4, 60, 10, one)
	check("others were lost", true, true)
	read(5, 120, 10, one)
	read(6, 120, 10, one)
	check("they are lost now", false, true)
}

// Fails when a chain that cannot be read gives no warning, or one for each subnet, and when a
// chain gives one that the next look will read.
func TestUnreadChainIsOneWarning(t *testing.T) {
	subnets := []config.Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24")}, {Prefix: netip.MustParsePrefix("10.47.12.0/24")}}
	const chain = "read nftables table inet filter: chain forward: an expression that nobody knows"
	for _, tc := range []struct {
		err  error
		want int
	}{{nil, 0}, {errors.New(chain), 1}, {fmt.Errorf("inet filter: %w", nfnl.ErrInterrupted), 0}} {
		decisions := map[netip.Prefix]decision{}
		for _, s := range subnets {
			decisions[s.Prefix] = decision{err: tc.err}
		}
		var got warnings
		got.addDecisions(config.Config{Subnets: subnets}, decisions, (&cone.Model{}).MapAlone)
		if len(got) != tc.want || tc.want > 0 && (got[0].ID != warnChainsUnread || !strings.Contains(got[0].Text, chain)) {
			t.Errorf("with %v: %q", tc.err, got)
		}
	}
}

// Fails when a network that "auto" enabled and the firewall keeps in, beside one that it lets out, is
// called a fault, and when one that the user named is not.
func TestNetworkThatTheFirewallKeepsInIsNoFault(t *testing.T) {
	lan, iot := netip.MustParsePrefix("192.168.1.0/24"), netip.MustParsePrefix("192.168.50.0/24")
	kept := decision{blocker: userrules.Blocker{Chain: "inet filter forward"}}
	for name, tc := range map[string]struct {
		auto bool
		lan  decision
		want []warningID
	}{
		"auto, one let out": {true, decision{}, []warningID{warnHostsKeptIn}},
		"auto, none":        {true, kept, []warningID{warnHostsBlocked, warnHostsBlocked}},
		"named":             {false, decision{}, []warningID{warnHostsBlocked}},
	} {
		cfg := config.Config{AutoSubnets: tc.auto, Subnets: []config.Subnet{{Prefix: lan}, {Prefix: iot}}}
		var got warnings
		got.addDecisions(cfg, map[netip.Prefix]decision{lan: tc.lan, iot: kept}, (&cone.Model{}).MapAlone)
		var ids []warningID
		for _, w := range got {
			ids = append(ids, w.ID)
		}
		if !slices.Equal(ids, tc.want) {
			t.Errorf("%s: %q, want %q", name, ids, tc.want)
		}
	}
}
