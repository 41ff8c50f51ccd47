package flows

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// mostSuspects bounds the children and the permissions that one look asks routes about.
const mostSuspects = 1 << 14

// Strands are the children, flows with mappings and permissions that may have a wrong address:
// packets of their hosts leave by another link now, and the rules would surely give them another address there. While
// a route has several next hops, which lead each flow by a link of its own, only an address whose
// link does not run is wrong.
type Strands struct {
	Rules  *userrules.Ruleset
	Routes *Router // closed at the end
	Fixed  *Fixed
	Shares bool                   // a route to outside links has several next hops
	Had    map[cone.Addr]struct{} // addresses that links have, or had
	// Former reports whether a host has no mapping on an address that is lost, so that the rules
	// alone tell what its packets get.
	Former func(host, addr cone.Addr) bool
	// Permissions shows all permissions. It returns an error if it could not.
	Permissions func(see func(cone.View)) error
	// Rerouted notes the permissions that are stale from now on, for which has returns true.
	Rerouted func(has func(cone.Permission) bool)

	sources  *Sources
	noted    []*sentFlow                  // children and flows with mappings, as their hosts send them
	suspects map[cone.Endpoint][]*suspect // by inside endpoint
	n        int                          // suspects
}

// End ends the flows with a wrong address among those that See noted, and returns how many.
// Before that it ends the permissions that would admit them again, if all that their hosts send by
// these is wrong, and adds them to stale.
func (s *Strands) End(q *ctwatch.Queries, stale Stale) (ended int, err error) {
	s.endPermissions(stale, true)
	var wrong []cone.Flow
	for _, c := range s.noted {
		switch {
		case !s.wrong(c):
		case c.child:
			wrong = append(wrong, c.Turned())
		default:
			wrong = append(wrong, c.Flow)
		}
	}
	_, err = Delete(q, wrong)
	s.endPermissions(stale, false) // that takes longer
	if failed := s.Routes.Close(); failed != nil {
		err = errors.Join(err, fmt.Errorf("find children that are answered by another link: %w", failed))
	}
	return len(wrong), err
}

// Any reports whether one of these children has a wrong address.
func (s *Strands) Any(network gateway.Network, children []cone.Flow) (bool, error) {
	s.sources = NewSources(network, s.Had)
	found := slices.ContainsFunc(children, func(f cone.Flow) bool {
		sent := f.Turned()
		return s.Fixed.translated.Holds(sent.Src.Addr) && s.wrong(&sentFlow{Flow: sent})
	})
	return found, s.Routes.Close()
}

// A suspect is a permission whose address may be wrong.
type suspect struct {
	cone.Permission
	sent      []*sentFlow // what its host sends with it, to children as well
	children  bool        // children are among sent
	elsewhere *sentFlow   // what its host sends to a peer with another outside address
}

// A sentFlow is a flow as its host sends it.
type sentFlow struct {
	cone.Flow
	child, judged, broken bool
}

// wrong reports whether the rules would surely give the host's packet another address on the
// links by which it leaves now.
func (s *Strands) wrong(f *sentFlow) bool {
	if !f.judged {
		runs := s.sources.own[f.ReplyDst.Addr].runs
		f.judged = true
		f.broken = !(runs && s.Shares) && s.sources.broken(s.Rules, s.Routes, &brokenFlow{Flow: f.Flow})
	}
	return f.broken
}

// stale reports whether all is wrong that the host sends with the permission. Of a permission
// for several peers, whose ways may differ, that is known only while the host sends something.
func (s *Strands) stale(x *suspect) bool {
	if len(x.sent) > 0 {
		return !slices.ContainsFunc(x.sent, func(f *sentFlow) bool { return !s.wrong(f) })
	}
	if x.HostBits != 0 || x.elsewhere == nil {
		return false
	}
	f := x.elsewhere.Flow
	f.ReplyDst = x.Ext
	if !s.wrong(&sentFlow{Flow: f}) {
		return false
	}
	for _, port := range []uint16{1, math.MaxUint16} { // rules may lead one port alone by another link
		f := cone.Flow{Src: x.Int, ReplySrc: cone.Endpoint{Addr: f.ReplySrc.Addr, Port: port}, ReplyDst: x.Ext}
		if !s.wrong(&sentFlow{Flow: f}) {
			return false
		}
	}
	return true
}

// endPermissions ends the permissions that are stale, of those with or without children.
func (s *Strands) endPermissions(stale Stale, withChildren bool) {
	before := len(stale)
	for _, all := range s.suspects {
		for _, x := range all {
			if x.children == withChildren && s.stale(x) {
				stale[claimantOf(&x.Permission)] = struct{}{}
			}
		}
	}
	if len(stale) > before {
		s.Rerouted(maps.Clone(stale).has)
	}
}

// Begin begins a look at all flows with the permissions whose address is on another link than the
// only outside one, or gone. See has to see each flow then.
func (s *Strands) Begin(network gateway.Network) error {
	s.sources, s.suspects = NewSources(network, s.Had), make(map[cone.Endpoint][]*suspect)
	return s.Permissions(func(v cone.View) {
		if !v.Routed() && s.sources.Another(v.Ext.Addr) && s.n < mostSuspects {
			s.n++
			s.suspects[v.Int] = append(s.suspects[v.Int], &suspect{Permission: v.Permission})
		}
	})
}

// See notes children whose address is on another link than the only outside one, or gone, flows whose
// mapping ended because its address is gone, and what hosts send with the permissions that Begin
// noted. It copies what it keeps.
func (s *Strands) See(f *cone.Flow) {
	sent, child := *f, f.IsChild()
	switch {
	case child:
		sent = f.Turned()
	case !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT):
		return
	}
	wanted := len(s.noted) < mostSuspects && (child && s.sources.Another(sent.ReplyDst.Addr) ||
		!child && s.Fixed.mapped.Holds(sent.Src.Addr) && s.Former(sent.Src.Addr, sent.ReplyDst.Addr))
	if !wanted && len(s.suspects[sent.Src]) == 0 || !s.Fixed.translated.Holds(sent.Src.Addr) {
		return
	}
	noted := &sentFlow{Flow: sent, child: child}
	if wanted {
		s.noted = append(s.noted, noted)
	}
	for _, x := range s.suspects[sent.Src] {
		switch {
		case !x.Peers().Contains(sent.ReplySrc.Addr.Netip()):
		case sent.ReplyDst == x.Ext:
			x.sent, x.children = append(x.sent, noted), x.children || child
		case sent.ReplyDst.Addr != x.Ext.Addr:
			x.elsewhere = noted
		}
	}
}

// Stale are permissions for packets that leave by another link than the one that has
// the outside address.
type Stale map[claimant]struct{}

// A claimant identifies a permission, whatever its mark.
type claimant struct {
	cone.Key
	in cone.Endpoint
}

func claimantOf(p *cone.Permission) claimant { return claimant{p.Key, p.Int} }

func (s Stale) has(p cone.Permission) bool {
	_, stale := s[claimantOf(&p)]
	return stale
}
