package flows

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Sources are the addresses of links, which flows may have outside.
type Sources struct {
	had    map[cone.Addr]struct{} // that links have, or had
	byLink map[int][]ownAddr
	own    map[cone.Addr]place
	only   map[gateway.Families]int // the only outside link for a family; 0 if there are several
	owned  func(cone.Addr) bool
}

// An ownAddr is an address that a link has.
type ownAddr struct {
	addr   netip.Addr
	narrow bool
}

// A place is where an address is: on a link.
type place struct {
	link int
	runs bool // at least one link with the address runs
}

// NewSources returns the addresses of the links of n. had are addresses that links have, or had.
func NewSources(n gateway.Network, had map[cone.Addr]struct{}) *Sources {
	s := &Sources{had: had, byLink: make(map[int][]ownAddr), own: make(map[cone.Addr]place), owned: n.Owned()}
	runs := make(map[int]bool)
	s.only = make(map[gateway.Families]int)
	for _, l := range n.Links {
		runs[l.Index] = l.Runs()
		for _, f := range []gateway.Families{gateway.IPv4, gateway.IPv6} {
			if l.Outside&f == 0 {
				continue
			}
			if _, another := s.only[f]; another {
				s.only[f] = 0
			} else {
				s.only[f] = l.Index
			}
		}
	}
	for _, a := range n.Addrs {
		addr := cone.AddrFrom(a.Prefix.Addr())
		s.byLink[a.Link] = append(s.byLink[a.Link], ownAddr{a.Prefix.Addr(), a.Narrow})
		s.own[addr] = place{a.Link, runs[a.Link] || s.own[addr].runs}
	}
	return s
}

// mayBeWrong reports whether f, which is translated, may have the wrong address: one that an
// outside link had, or one of a link that is not the only outside link. An address that no
// link ever had is routed to the gateway.
func (s *Sources) mayBeWrong(f *cone.Flow) bool {
	if _, had := s.had[f.ReplyDst.Addr]; !had {
		return false
	}
	if p, own := s.own[f.ReplyDst.Addr]; own {
		only := s.only[gateway.FamilyOf(f.ReplyDst.Addr.Netip())]
		return only == 0 || p.link != only
	}
	return s.isGone(f)
}

// isGone reports whether the address of f is gone, or no link that has it runs.
func (s *Sources) isGone(f *cone.Flow) bool {
	if p, own := s.own[f.ReplyDst.Addr]; own {
		return !p.runs
	}
	return !s.owned(f.ReplyDst.Addr)
}

// broken reports whether f is broken: no link by which it may leave has its source, and the
// rules would surely give it another source on each of them. It notes the first link in f.
func (s *Sources) broken(rs *userrules.Ruleset, routes *Router, f *brokenFlow) bool {
	if _, own := s.own[f.Src.Addr]; own {
		return false
	}
	ways, all := routes.Links(&f.Flow)
	if !all || len(ways) == 0 {
		return false
	}
	for _, l := range ways {
		if l.Outside&gateway.FamilyOf(f.Src.Addr.Netip()) == 0 || s.has(l, f.source()) || !s.gives(rs, l, f) {
			return false
		}
	}
	f.link = ways[0].Name
	return true
}

func (s *Sources) has(l gateway.Link, a netip.Addr) bool {
	return slices.ContainsFunc(s.byLink[l.Index], func(o ownAddr) bool { return o.addr == a })
}

// gives reports whether rules would surely give f another source on link l, whichever of those
// they may give. That is not sure if they masquerade and l has no address of global scope:
// masquerade takes one of another link then.
func (s *Sources) gives(rs *userrules.Ruleset, l gateway.Link, f *brokenFlow) bool {
	n, known := rs.SourcesOf(userrules.Leaving{
		Src: f.Src.Netip(), Dst: f.ReplySrc.Netip(), Out: LinkOf(l),
	})
	if !known || n.Kept && f.source() == f.Src.Addr.Netip() {
		return false
	}
	if !n.Masquerade && len(n.Addrs) == 0 { // hosts keep their own there, unless no rules translate at all
		return f.Src.Addr.Is4() && len(rs.SourceNAT()) > 0
	}
	if n.Masquerade && !slices.ContainsFunc(s.byLink[l.Index], func(o ownAddr) bool { return o.addr.Is4() == f.Src.Addr.Is4() && !o.narrow }) {
		return false
	}
	return !n.Addrs.Has(f.source())
}

// Lost reports whether a link had an address that the gateway no longer has.
func (s *Sources) Lost(a cone.Addr) bool {
	_, had := s.had[a]
	_, own := s.own[a]
	return had && !own && !s.owned(a)
}

// Another reports whether an address is on a link that is not the only outside one of its family,
// or is lost.
func (s *Sources) Another(a cone.Addr) bool {
	if s.Lost(a) {
		return true
	}
	_, own := s.own[a]
	only := s.only[gateway.FamilyOf(a.Netip())]
	return own && (only == 0 || !slices.ContainsFunc(s.byLink[only], func(o ownAddr) bool { return o.addr == a.Netip() }))
}
