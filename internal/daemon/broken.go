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
	// brokenShare bounds the CPU time of looks at flows that may be broken: one part in so
	// many.
	brokenShare = 50
	// brokenAgain is the time between two looks of which both must find a flow broken.
	brokenAgain = time.Second
	// mostHealed bounds the flows that end after one look.
	mostHealed = 500
	// mostAskedFlows bounds the flows that one look asks rules and routes about. The next one
	// goes on with the others.
	mostAskedFlows = 1 << 14
)

// brokenFlows is about flows of enabled hosts that leave with a source that the user's
// rules would not give them now.
type brokenFlows struct {
	due    bool          // something changed since the last look
	next   time.Duration // not before
	from   int           // the first of the flows to ask about
	asked  int           // how many flows there were to ask about
	before map[uint32]*userrules.Ruleset
	ended  map[endedFlow]time.Duration // when
}

// goOn lets the next look ask about other flows, unless it must find the same ones again.
func (b *brokenFlows) goOn() {
	if len(b.before) > 0 {
		return
	}
	if b.from += mostAskedFlows; b.from >= b.asked {
		b.from = 0
	}
}

// An endedFlow is one that ended, with the source that was wrong.
type endedFlow struct {
	src, peer cone.Endpoint
	source    cone.Addr
}

// sawEnd notes that a flow ends now, and reports whether one like it did so a short while
// ago. If it came back as it was, something else than rules translates it.
func (b *brokenFlows) sawEnd(now time.Duration, f *brokenFlow) bool {
	const memory, most = time.Minute, 1 << 14
	k := endedFlow{f.Src, f.ReplySrc, f.ReplyDst.Addr}
	if at, ended := b.ended[k]; ended && now-at < memory {
		return true
	}
	if b.ended == nil || len(b.ended) == most {
		b.ended = make(map[endedFlow]time.Duration)
	}
	b.ended[k] = now
	return false
}

// lookForBroken looks for broken flows, if something changed, counts them, and ends them if
// the user wants that and they were broken at the last look by the same rules.
func (d *Daemon) lookForBroken() error {
	if !d.broken.due || d.now() < d.broken.next {
		return nil
	}
	var cfg config.Config
	if !d.ask(func() { cfg = d.cfg.Config }) {
		return nil
	}
	d.broken.due = false
	var found []brokenFlow
	var ended int
	var err error
	took := threadTime(func() {
		if found, err = d.findBroken(cfg); err == nil {
			ended, err = d.heal(cfg, found)
		}
	})
	d.broken.goOn()
	d.broken.next = d.now() + max(brokenAgain, brokenShare*took)
	if err != nil {
		return fmt.Errorf("look for flows with another source than rules give: %w", err)
	}
	d.noted.note(slog.LevelInfo, "healed", "flows left with another source than your rules give now; they ended", uint64(ended))
	sum := sumBroken(found)
	d.ask(func() {
		d.brokenNow = sum
		d.healed += uint64(ended)
		d.warned.tell(d.now(), d.warnings())
	})
	return nil
}

// A brokenFlow is one with the subnet that it is of, and the link by which it leaves.
type brokenFlow struct {
	cone.Flow
	subnet netip.Prefix
	link   string
}

// source returns the address with which f leaves.
func (f *brokenFlow) source() netip.Addr { return f.ReplyDst.Addr.Netip() }

// findBroken returns the flows of enabled hosts that the user's rules would surely give
// another source now. Where these cannot be read it finds none.
func (d *Daemon) findBroken(cfg config.Config) (found []brokenFlow, err error) {
	rs := d.firewall.user
	if rs == nil || d.firewall.unread != nil {
		return nil, nil
	}
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	flows, n := []brokenFlow{}, 0
	ways := newSources(d.network)
	err = q.Dump(func(f *cone.Flow) {
		subnet, ok := mayBreak(cfg, f)
		if !ok || f.Status.Has(cone.StatusSrcNAT) && (d.firewall.mapping && subnet.Mapping == config.EndpointIndependentMapping || ways.isOnlyWay(f)) {
			return
		}
		if n++; n > d.broken.from && len(flows) < mostAskedFlows {
			flows = append(flows, brokenFlow{Flow: *f, subnet: subnet.Prefix})
		}
	})
	if err != nil {
		return nil, err
	}
	d.broken.asked = n
	routes := &router{network: d.network}
	for i := range flows {
		if f := &flows[i]; ways.broken(rs, routes, f) {
			found = append(found, *f)
		}
	}
	return found, routes.close()
}

// mayBreak reports whether f is a flow that rules of the user's may translate: one of an
// IPv4 host of a subnet that is not routed. One that was answered though it was not
// translated works. Conntrack helpers translate the flows that they expect.
func mayBreak(cfg config.Config, f *cone.Flow) (s config.Subnet, ok bool) {
	if !f.Src.Addr.Is4() || f.OrigZone != 0 || f.ReplyZone != 0 || cone.IsAnchor(f.Src, f.Dst) ||
		f.Status.Has(cone.StatusDstNAT) || f.Status.Has(cone.StatusExpected) ||
		!f.Status.Has(cone.StatusSrcNAT) && f.Status.Has(cone.StatusSeenReply) {
		return s, false
	}
	i := slices.IndexFunc(cfg.Subnets, func(s config.Subnet) bool { return s.Prefix.Contains(f.Src.Addr.Netip()) })
	if i < 0 || cfg.Subnets[i].Routed {
		return s, false
	}
	return cfg.Subnets[i], true
}

// sources are the addresses of links.
type sources struct {
	byLink map[int][]netip.Addr
	own    map[cone.Addr]int // the link of each
	only   int               // the only outside link, or 0
}

func newSources(n gateway.Network) *sources {
	s := &sources{byLink: make(map[int][]netip.Addr), own: make(map[cone.Addr]int)}
	for _, a := range n.Addrs {
		s.byLink[a.Link] = append(s.byLink[a.Link], a.Prefix.Addr())
		s.own[cone.AddrFrom(a.Prefix.Addr())] = a.Link
	}
	outside := 0
	for _, l := range n.Links {
		if l.Outside&gateway.IPv4 != 0 {
			outside++
			s.only = l.Index
		}
	}
	if outside != 1 {
		s.only = 0
	}
	return s
}

// isOnlyWay reports whether f has an address of the only outside link: no route need be
// asked for.
func (s *sources) isOnlyWay(f *cone.Flow) bool {
	return s.only != 0 && s.own[f.ReplyDst.Addr] == s.only
}

// broken reports whether rules would surely give f another source on each link by which it
// may leave, and notes the first.
func (s *sources) broken(rs *userrules.Ruleset, routes *router, f *brokenFlow) bool {
	if _, own := s.own[f.Src.Addr]; own {
		return false
	}
	ways := routes.links(&f.Flow)
	for _, l := range ways {
		if l.Outside&gateway.IPv4 == 0 || !s.gives(rs, l, f) {
			return false
		}
	}
	if len(ways) == 0 {
		return false
	}
	f.link = ways[0].Name
	return true
}

// gives reports whether rules would surely give f another source on a link.
func (s *sources) gives(rs *userrules.Ruleset, l gateway.Link, f *brokenFlow) bool {
	n, sure := rs.SourceOf(userrules.Leaving{
		Src: f.Src.Netip(), Dst: f.ReplySrc.Netip(), Out: userrules.Link{Index: l.Index, Name: l.Name},
	})
	if !sure || !n.Masquerade && len(n.Addrs) == 0 || n.Masquerade && len(s.byLink[l.Index]) == 0 {
		return false
	}
	if n.Masquerade && slices.Contains(s.byLink[l.Index], f.source()) {
		return false
	}
	return !slices.ContainsFunc(n.Addrs, func(r userrules.AddrRange) bool { return r.Has(f.source()) })
}

// heal ends those that were found broken at the last look, too, by the same rules.
func (d *Daemon) heal(cfg config.Config, found []brokenFlow) (ended int, err error) {
	before := d.broken.before
	d.broken.before = nil
	if !cfg.HealFlows || len(found) == 0 {
		return 0, nil
	}
	d.broken.due = true // to see that they are gone, or to end them
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	d.broken.before = make(map[uint32]*userrules.Ruleset)
	var errs []error
	for i := range found {
		f := &found[i]
		if before[f.ID] != d.firewall.user || ended == mostHealed {
			d.broken.before[f.ID] = d.firewall.user
			continue
		}
		if d.broken.sawEnd(d.now(), f) {
			continue
		}
		ok, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		errs = append(errs, err)
		if ok {
			ended++
		}
	}
	return ended, errors.Join(errs...)
}

// sumBroken returns what status shows of broken flows.
func sumBroken(found []brokenFlow) (all []control.BrokenFlows) {
	for i := range found {
		f := &found[i]
		b := control.BrokenFlows{Subnet: f.subnet, Link: f.link, Flows: 1, Int: f.Src.Netip(), Peer: f.ReplySrc.Netip()}
		if f.Status.Has(cone.StatusSrcNAT) {
			b.Source = f.source()
		}
		at := slices.IndexFunc(all, func(a control.BrokenFlows) bool {
			return a.Subnet == b.Subnet && a.Link == b.Link && a.Source == b.Source
		})
		switch {
		case at >= 0:
			all[at].Flows++
		case len(all) < mostBrokenKinds:
			all = append(all, b)
		}
	}
	slices.SortFunc(all, func(a, b control.BrokenFlows) int {
		return strings.Compare(fmt.Sprint(a.Subnet, a.Link, a.Source), fmt.Sprint(b.Subnet, b.Link, b.Source))
	})
	return all
}

// mostBrokenKinds bounds what status shows of them.
const mostBrokenKinds = 64

// warnBroken warns of flows that cannot work any more.
func (d *Daemon) warnBroken(out *warnings) {
	for _, b := range d.brokenNow {
		how, about := "untranslated", fmt.Sprint(b.Subnet, " ", b.Link)
		if b.Source.IsValid() {
			how = fmt.Sprintf("with the address %v", b.Source)
			about += " " + b.Source.String()
		}
		advice := "heal_flows = true ends such flows"
		if d.cfg.HealFlows {
			advice = "they are being ended"
		}
		out.add(warnBrokenFlows, about, "%d flows of %v leave by %s %s, such as that of %v to %v, where your rules would give them another source now: %s",
			b.Flows, b.Subnet, b.Link, how, b.Int, b.Peer, advice)
	}
}
