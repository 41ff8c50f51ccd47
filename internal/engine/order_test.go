package engine

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
)

// A journal notes what the carriers are asked, in order.
type journal []string

func (j *journal) note(verb, carrier string, ps []cone.Permission) {
	for i := range ps {
		*j = append(*j, fmt.Sprint(verb, " by ", carrier, " ", ps[i].Int))
	}
}

type notedExpectations struct {
	Expectations
	*journal
}

func (x notedExpectations) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	x.note("grant", "expect", ps)
	x.Expectations.Grant(ps, refused)
}

func (x notedExpectations) Revoke(ps []cone.Permission) error {
	x.note("revoke", "expect", ps)
	return x.Expectations.Revoke(ps)
}

type notedMap struct {
	Map
	*journal
}

func (m notedMap) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	m.note("grant", "nft", ps)
	m.Map.Grant(ps, refused)
}

func (m notedMap) Revoke(ps []cone.Permission) error {
	m.note("revoke", "nft", ps)
	return m.Map.Revoke(ps)
}

type notedFlows struct {
	Flows
	*journal
}

func (f notedFlows) Delete(src, dst cone.Endpoint, zone uint16, id uint32) (bool, error) {
	*f.journal = append(*f.journal, fmt.Sprint("drop child ", src))
	return f.Flows.Delete(src, dst, zone, id)
}

// A packet waits for the expectation of the new owner, so nothing that is slow comes before it.
// The map still loses the old owner's permission before it holds another one, and before the old
// owner's children are dropped.
//
// Fails when the map's part of a revocation comes before the expectation that follows, or after
// what must follow it.
func TestNewExpectationDoesNotWaitForTheMap(t *testing.T) {
	const former, next = "10.47.11.109:5060", "10.47.11.110:5060"
	for _, c := range []struct {
		name, kind string
		choice     cone.Choice
		want       journal
	}{
		{"learned", "auto", cone.ChooseBoth, journal{
			"grant by expect " + next, "drop child 203.0.113.5:5070", "grant by nft " + next,
		}},
		{"nothing is learned", "both", cone.ChooseBoth, journal{
			"grant by expect " + next, "revoke by nft " + former, "drop child 203.0.113.5:5070", "grant by nft " + next,
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := newSimulated().(simulated)
			p := policies(c.kind)[0]
			p.Subnets = slices.Clone(p.Subnets)
			p.Subnets[0].Choice = c.choice
			runStage(t, m, p, func(s *stage) {
				old := s.open(former, "203.0.113.5:5060")
				child, _ := m.receive(endpoint("203.0.113.5:5070"), old.Ext)
				s.e.Model.FlowSeen(s.now, &child.Flow)
				gone := s.flows[0]
				s.e.FlowGone(s.now, gone)
				s.e.Apply(0)

				var j journal
				k := &s.e.Kernel
				k.Expectations, k.Map, k.Flows = notedExpectations{k.Expectations, &j}, notedMap{k.Map, &j}, notedFlows{k.Flows, &j}
				s.now += time.Second
				s.open(next, "203.0.113.5:5060")
				if diff := cmp.Diff(c.want, j); diff != "" {
					t.Errorf("-want +asked\n%s", diff)
				}
			})
		})
	}
}
