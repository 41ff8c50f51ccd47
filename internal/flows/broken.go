package flows

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

const (
	// brokenShare bounds the CPU time of looks for broken flows to 1/brokenShare of a CPU,
	// but the next look comes after brokenLate at most. While something changes all
	// the time and looks find nothing, the time between them doubles.
	brokenShare = 200
	brokenLate  = 30 * time.Second
	// healShare and healLate do the same while flows wait for the look that ends them.
	healShare = 20
	healLate  = 3 * time.Second
	// brokenAgain is the least time between two looks. A flow is ended when two find it broken.
	brokenAgain = time.Second
	// longestLook bounds the time that one look spends on rules and routes of flows.
	longestLook = 100 * time.Millisecond
	// brokenLooks is how many looks after a change wait to see whether flows are answered.
	brokenLooks = 20
	// mostHealed bounds the flows that one look ends.
	mostHealed = 500
	// mostBrokenKinds bounds the kinds of broken flows that a walk counts.
	mostBrokenKinds = 64
	// pauseEvery is how many flows of a dump are between two pauses, and routesAtOnce how many
	// questions about routes.
	pauseEvery, routesAtOnce = 1024, 64
)

// A Search is the search for broken flows: flows of enabled hosts that cannot work with
// the source that they have, which the user's rules would not give them now. The zero value is
// ready for use.
type Search struct {
	due  bool          // something changed since the last look
	next time.Duration // earliest time of the next look
	// soonest is next without regard to looks that found nothing. Other addresses, or other
	// source NAT, are a new reason to look.
	soonest time.Duration
	looks   int // looks still to come that wait for answers
	empty   int // looks in a row that found nothing, with little time between
	walk    walk
	sum     []Broken // found by this walk so far
	shown   bool     // the last walk found some, which may have ended since
	before  map[uint32]foundBefore
	by      *userrules.Ruleset // the rules at the last look
	healed  healedFlows
	had     map[cone.Addr]struct{} // IPv4 addresses that outside links have, or had
	answers
}

// Broken are broken flows of one kind.
type Broken struct {
	Subnet   netip.Prefix   // of their hosts
	Link     string         // by which they leave
	Source   netip.Addr     // with which they leave; invalid if they are untranslated
	Flows    int            // how many
	CameBack bool           // they were ended before, and came back unchanged
	Int      netip.AddrPort // the inside endpoint of the first one
	Peer     netip.AddrPort // and its peer
}

// A Subnet is an enabled subnet.
type Subnet struct {
	Prefix netip.Prefix
	Routed bool
	Mapped bool // the flows of its hosts have mappings
}

// A View is what a look judges flows by.
type View struct {
	Rules   *userrules.Ruleset // nil if they are not known
	Network gateway.Network
	Routes  *Router // closed at the end
	Subnets []Subnet
	Now     func() time.Duration
	Pause   func() // called now and then during a long look
	Heal    bool   // end broken flows
}

// foundBefore says that a flow was found at the last look.
type foundBefore struct {
	by   *userrules.Ruleset // the rules then
	walk int
}

// Again asks for another look, for flows may have begun or ended.
func (b *Search) Again() { b.due = true }

// changed notes that rules, routes or addresses changed.
func (b *Search) changed() {
	b.due, b.looks = true, brokenLooks
	b.healed.changes++
}

// hurry forgets that looks found nothing.
func (b *Search) hurry() { b.empty, b.next = 0, min(b.next, b.soonest) }

// SawNetwork notes the addresses of outside links. Any other source of a flow may be an
// address that is routed to the gateway without being on a link.
func (b *Search) SawNetwork(before, now gateway.Network) {
	const most = 1 << 12
	switch {
	case b.had == nil, !slices.Equal(now.Addrs, before.Addrs):
		b.hurry()
		b.changed()
	case !now.SameRoutes(before):
		b.changed()
	case b.shown:
		b.due = true
	}
	if b.had == nil || len(b.had) > most {
		b.had = make(map[cone.Addr]struct{})
	}
	for _, a := range now.OutsideAddrs() {
		if a.Prefix.Addr().Is4() {
			b.had[cone.AddrFrom(a.Prefix.Addr())] = struct{}{}
		}
	}
}

// SawRules takes in the user's rules. What they translate may have changed.
func (b *Search) SawRules(rs *userrules.Ruleset) {
	if b.by == rs {
		return
	}
	if !rs.SameSources(b.by) {
		b.hurry()
	}
	b.by = rs
	b.changed()
}

// Due reports whether it is time for a look.
func (b *Search) Due(now time.Duration) bool { return b.due && now >= b.next }

// Look looks for broken flows and counts them. With v.Heal it ends those that the last look found
// broken, too, by the same rules. measure runs a function, and returns the CPU time that it took.
// finished says that all flows were checked, and all are the broken ones then.
func (b *Search) Look(v *View, measure func(func()) time.Duration) (ended int, all []Broken, finished bool, err error) {
	if v.Now() > b.next+brokenLate {
		b.hurry()
	}
	b.due = false
	var found []brokenFlow
	took := measure(func() {
		if found, err = b.find(v); err == nil {
			ended, err = b.heal(v, found)
		}
	})
	b.next = v.Now() + untilNextLook(took, len(b.before) > 0, b.empty)
	b.soonest = v.Now() + untilNextLook(took, len(b.before) > 0, 0)
	if b.empty++; len(found) > 0 || b.awaited {
		b.hurry()
	}
	if err != nil {
		b.restart()
		return ended, nil, false, err
	}
	if finished = b.walk.from == 0; finished {
		all, b.sum = b.sum, nil
		b.shown = len(all) > 0
		b.answers.next()
	}
	if b.awaited && b.looks > 0 {
		b.looks--
		b.due = true
	}
	b.due = b.due || !finished
	return ended, all, finished, nil
}

// restart begins another walk.
func (b *Search) restart() { b.walk.from, b.sum = 0, nil }

// untilNextLook returns the time from a look that took so much CPU time to the next one.
// empty is how many looks in a row found nothing before.
func untilNextLook(took time.Duration, toHeal bool, empty int) time.Duration {
	if toHeal {
		return max(brokenAgain, min(healShare*took, healLate))
	}
	const mostDoubled = 10
	return min(max(brokenAgain, brokenShare*took)<<min(empty, mostDoubled), brokenLate)
}

// A brokenFlow is a broken flow with its subnet and the link by which it leaves.
type brokenFlow struct {
	cone.Flow
	subnet netip.Prefix
	link   string
	at     int  // position in the walk
	back   bool // it was ended before, and came back unchanged
}

// source returns the address with which f leaves.
func (f *brokenFlow) source() netip.Addr { return f.ReplyDst.Addr.Netip() }

// find returns the flows of enabled hosts that can no longer work, and to which the
// user's rules would surely give another source now. It first checks the flows that the last
// look found, then goes on where that look ended. It finds none if rules cannot be read, or
// if routing rules hide by which links packets leave.
func (b *Search) find(v *View) (found []brokenFlow, err error) {
	b.awaited = false
	if v.Rules == nil || v.Network.HidesWays(gateway.IPv4) {
		b.restart()
		return nil, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	b.walk.begin()
	var again, others []brokenFlow
	sources, n := NewSources(v.Network, b.had), 0
	subnets := cone.NewPrefixTable(prefixes(v.Subnets))
	err = q.Dump(func(f *cone.Flow) {
		if n++; n%pauseEvery == 0 {
			v.Pause()
		}
		if !mayBreak(f) {
			return
		}
		i := subnets.Find(f.Src.Addr.Netip())
		if i < 0 || v.Subnets[i].Routed {
			return
		}
		subnet := v.Subnets[i]
		if f.Status.Has(cone.StatusSrcNAT) && (subnet.Mapped || !sources.mayBeWrong(f)) {
			return
		}
		_, twice := b.before[f.ID]
		if at, ok := b.walk.take(twice); ok && twice {
			again = append(again, brokenFlow{Flow: *f, subnet: subnet.Prefix, at: at})
		} else if ok {
			others = append(others, brokenFlow{Flow: *f, subnet: subnet.Prefix, at: at})
		}
	})
	if err != nil {
		return nil, err
	}
	began := v.Now()
	for i, f := range slices.Concat(again, others) {
		if i%routesAtOnce == 0 {
			v.Pause()
			if i >= len(again)+routesAtOnce && v.Now()-began > longestLook {
				b.walk.stop()
				break
			}
		}
		if i >= len(again) {
			b.walk.last = f.at
		}
		if sources.broken(v.Rules, v.Routes, &f) && b.unanswered(v.Now(), &f.Flow, sources.isGone(&f.Flow)) {
			f.back = b.healed.cameBack(v.Now(), &f)
			found = append(found, f)
		}
	}
	b.walk.end()
	return found, v.Routes.Close()
}

func prefixes(subnets []Subnet) (all []netip.Prefix) {
	for _, s := range subnets {
		all = append(all, s.Prefix)
	}
	return all
}

// mayBreak reports whether the user's rules may translate f, provided that it comes from an
// IPv4 subnet that is not routed. An answered flow without translation works. Expected flows
// do not count: their conntrack helper translates them.
func mayBreak(f *cone.Flow) bool {
	return f.Src.Addr.Is4() && f.OrigZone == 0 && f.ReplyZone == 0 && !cone.IsAnchor(f.Src, f.Dst) &&
		!f.Status.Has(cone.StatusDstNAT) && !f.Status.Has(cone.StatusExpected) &&
		(f.Status.Has(cone.StatusSrcNAT) || !f.Status.Has(cone.StatusSeenReply))
}

// heal counts the flows in found, and ends those that the last look found broken, too, by the
// same rules.
func (b *Search) heal(v *View, found []brokenFlow) (ended int, err error) {
	before := b.before
	b.before = nil
	for i := range found {
		if was, twice := before[found[i].ID]; !twice || was.walk != b.walk.number {
			b.sum = addBroken(b.sum, &found[i])
		}
	}
	if !v.Heal || len(found) == 0 {
		return 0, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	b.before = make(map[uint32]foundBefore)
	var errs []error
	for i := range found {
		f := &found[i]
		if f.back {
			continue
		}
		b.due = true // to end it, or to see that it is gone
		if before[f.ID].by != b.by || ended == mostHealed {
			b.before[f.ID] = foundBefore{b.by, b.walk.number}
			continue
		}
		b.healed.note(v.Now(), f)
		ok, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		errs = append(errs, err)
		if ok {
			ended++
		}
	}
	return ended, errors.Join(errs...)
}

// addBroken adds f to the kinds of broken flows, which are sorted.
func addBroken(all []Broken, f *brokenFlow) []Broken {
	b := Broken{Subnet: f.subnet, Link: f.link, Flows: 1, CameBack: f.back, Int: f.Src.Netip(), Peer: f.ReplySrc.Netip()}
	if f.Status.Has(cone.StatusSrcNAT) {
		b.Source = f.source()
	}
	at, known := slices.BinarySearchFunc(all, b, Broken.compare)
	switch {
	case known:
		all[at].Flows++
	case len(all) < mostBrokenKinds:
		all = slices.Insert(all, at, b)
	}
	return all
}

func (b Broken) compare(with Broken) int {
	number := map[bool]int{true: 1}
	return cmp.Or(
		strings.Compare(b.Subnet.String(), with.Subnet.String()), strings.Compare(b.Link, with.Link),
		b.Source.Compare(with.Source), cmp.Compare(number[b.CameBack], number[with.CameBack]),
	)
}
