package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

const (
	// brokenShare bounds the CPU time of looks for broken flows to 1/brokenShare of a CPU,
	// but the next look comes after brokenLate at most. This is apart from the budget for
	// changes by neighbours, whose looks must not be delayed. While something changes all
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
)

// brokenFlows is the search for broken flows: flows of enabled hosts that cannot work with
// the source that they have, which the user's rules would not give them now.
type brokenFlows struct {
	due  bool          // something changed since the last look
	next time.Duration // earliest time of the next look
	// soonest is next without regard to looks that found nothing. Other addresses, or other
	// source NAT, are a new reason to look.
	soonest time.Duration
	looks   int // looks still to come that wait for answers
	empty   int // looks in a row that found nothing, with little time between
	walk    walk
	sum     []control.BrokenFlows // found by this walk so far
	shown   bool                  // the last walk found some, which may have ended since
	before  map[uint32]foundBefore
	by      *userrules.Ruleset // the rules at the last look
	healed  healedFlows
	had     map[cone.Addr]struct{} // IPv4 addresses that outside links have, or had
	answers
}

// foundBefore says that a flow was found at the last look.
type foundBefore struct {
	by   *userrules.Ruleset // the rules then
	walk int
}

// changed notes that rules, routes or addresses changed.
func (b *brokenFlows) changed() {
	b.due, b.looks = true, brokenLooks
	b.healed.changes++
}

// hurry forgets that looks found nothing.
func (b *brokenFlows) hurry() { b.empty, b.next = 0, min(b.next, b.soonest) }

// sawNetwork notes the addresses of outside links. Any other source of a flow may be an
// address that is routed to the gateway without being on a link.
func (b *brokenFlows) sawNetwork(before, now gateway.Network) {
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

// sawRules takes in the user's rules. What they translate may have changed.
func (b *brokenFlows) sawRules(rs *userrules.Ruleset) {
	if b.by == rs {
		return
	}
	if !rs.SameSources(b.by) {
		b.hurry()
	}
	b.by = rs
	b.changed()
}

// lookForBroken looks for broken flows if something changed, and counts them. With heal_flows
// it ends those that the last look found broken, too, by the same rules.
func (r *reconciler) lookForBroken() error {
	b := &r.broken
	b.sawRules(r.firewall.user)
	if !b.due || r.now() < b.next {
		return nil
	}
	var cfg config.Config
	if !r.ask(func(l *loop) { cfg = l.cfg }) {
		return nil
	}
	if r.now() > b.next+brokenLate {
		b.empty, b.next = 0, min(b.next, b.soonest)
	}
	b.due = false
	var found []brokenFlow
	var ended int
	var err error
	took := threadTime(func() {
		if found, err = r.findBroken(cfg); err == nil {
			ended, err = r.heal(cfg, found)
		}
	})
	b.next = r.now() + untilNextLook(took, len(b.before) > 0, b.empty)
	b.soonest = r.now() + untilNextLook(took, len(b.before) > 0, 0)
	if b.empty++; len(found) > 0 || b.awaited {
		b.empty, b.next = 0, min(b.next, b.soonest)
	}
	if err != nil {
		b.walk.from, b.sum = 0, nil
		return fmt.Errorf("look for flows with another source than rules give: %w", err)
	}
	r.noted.note(slog.LevelInfo, "healed", "flows left with another source than your rules give now; they ended", uint64(ended))
	finished := b.walk.from == 0
	sum := b.sum
	if finished {
		b.sum, b.shown = nil, len(sum) > 0
		b.answers.next()
	}
	if b.awaited && b.looks > 0 {
		b.looks--
		b.due = true
	}
	b.due = b.due || !finished
	r.ask(func(l *loop) {
		if finished {
			l.brokenNow = sum
		}
		l.healed += uint64(ended)
		l.warned.tell(r.now(), l.warnings())
	})
	return nil
}

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

// findBroken returns the flows of enabled hosts that can no longer work, and to which the
// user's rules would surely give another source now. It first checks the flows that the last
// look found, then goes on where that look ended. It finds none if rules cannot be read, or
// if routing rules hide by which links packets leave.
func (r *reconciler) findBroken(cfg config.Config) (found []brokenFlow, err error) {
	b, rs := &r.broken, r.firewall.user
	b.awaited = false
	if rs == nil || r.firewall.unread != nil || r.network.HidesWays(gateway.IPv4) {
		b.walk.from, b.sum = 0, nil
		return nil, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	b.walk.begin()
	var again, others []brokenFlow
	ways, n := newSources(r.network, b.had), 0
	subnets := cone.NewPrefixTable(prefixes(cfg.Subnets))
	mapped := r.firewall.mapping
	err = q.Dump(func(f *cone.Flow) {
		if n++; n%flowsAtOnce == 0 {
			r.lookBetween()
		}
		if !mayBreak(f) {
			return
		}
		i := subnets.Find(f.Src.Addr.Netip())
		if i < 0 || cfg.Subnets[i].Routed {
			return
		}
		subnet := cfg.Subnets[i]
		if f.Status.Has(cone.StatusSrcNAT) && (mapped && subnet.Mapping == config.EndpointIndependentMapping || !ways.mayBeWrong(f)) {
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
	routes, began := r.firewall.router(cfg, r.network), r.now()
	for i, f := range slices.Concat(again, others) {
		const atOnce = 64
		if i%atOnce == 0 {
			r.lookBetween()
			if i >= len(again)+atOnce && r.now()-began > longestLook {
				b.walk.stop()
				break
			}
		}
		if i >= len(again) {
			b.walk.last = f.at
		}
		if ways.broken(rs, routes, &f) && b.unanswered(r.now(), &f.Flow, ways.isGone(&f.Flow)) {
			f.back = b.healed.cameBack(r.now(), &f)
			found = append(found, f)
		}
	}
	b.walk.end()
	return found, routes.close()
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
func (r *reconciler) heal(cfg config.Config, found []brokenFlow) (ended int, err error) {
	b := &r.broken
	before := b.before
	b.before = nil
	for i := range found {
		if was, twice := before[found[i].ID]; !twice || was.walk != b.walk.number {
			b.sum = addBroken(b.sum, &found[i])
		}
	}
	if !cfg.HealFlows || len(found) == 0 {
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
		b.healed.note(r.now(), f)
		ok, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		errs = append(errs, err)
		if ok {
			ended++
		}
	}
	return ended, errors.Join(errs...)
}

// addBroken adds f to what status shows of broken flows.
func addBroken(all []control.BrokenFlows, f *brokenFlow) []control.BrokenFlows {
	b := control.BrokenFlows{Subnet: f.subnet, Link: f.link, Flows: 1, CameBack: f.back, Int: f.Src.Netip(), Peer: f.ReplySrc.Netip()}
	if f.Status.Has(cone.StatusSrcNAT) {
		b.Source = f.source()
	}
	at, known := slices.BinarySearchFunc(all, b, func(a, b control.BrokenFlows) int {
		return strings.Compare(fmt.Sprint(a.Subnet, a.Link, a.Source, a.CameBack), fmt.Sprint(b.Subnet, b.Link, b.Source, b.CameBack))
	})
	switch {
	case known:
		all[at].Flows++
	case len(all) < mostBrokenKinds:
		all = slices.Insert(all, at, b)
	}
	return all
}

// mostBrokenKinds bounds the kinds of broken flows that status shows.
const mostBrokenKinds = 64

// warnBroken warns of flows that cannot work any more.
func (l *loop) warnBroken(out *warnings) {
	for _, b := range l.brokenNow {
		how, about := "untranslated", fmt.Sprint(b.Subnet, " ", b.Link)
		if b.Source.IsValid() {
			how = fmt.Sprintf("with the address %v", b.Source)
			about += " " + b.Source.String()
		}
		advice := "heal_flows = true ends such flows"
		switch {
		case b.CameBack:
			advice = "they came back as they were when heal_flows ended them, so something else than your rules translates them"
			about += " came back"
		case l.cfg.HealFlows:
			advice = "they are being ended"
		}
		out.add(warnBrokenFlows, about, "%d flows of %v leave by %s %s, such as that of %v to %v, where your rules would give them another source now: %s",
			b.Flows, b.Subnet, b.Link, how, b.Int, b.Peer, advice)
	}
}
