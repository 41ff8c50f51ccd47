package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// Why a flow of a host with mappings is without one. They are keys of the status.
const (
	notOnOutside = "their outside address is on no outside link"
	servedPort   = "the gateway serves their outside port, or you forward it"
	otherMapping = "they have another outside endpoint than their mapping; they are older than it, or a rule before conenatd's translates them"
)

// applied is how many living flows have their mapping, and why others have none.
type applied struct {
	flows uint64
	not   map[string]uint64
}

func (a *applied) missing(why string, n int) {
	if n == 0 {
		return
	}
	if a.not == nil {
		a.not = make(map[string]uint64)
	}
	a.not[why] += uint64(n)
}

// none reports whether flows should have mappings and not one of them has.
func (a *applied) none() bool { return a.flows == 0 && a.sum() >= fewFlows }

func (a *applied) sum() (n uint64) {
	for _, m := range a.not {
		n += m
	}
	return n
}

// check notes why f, which has no mapping, can get none. What goes to an address that
// is exempt needs none.
func (m *mapper) check(f *cone.Flow, link string) {
	if !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !m.inside(f.Src.Addr) ||
		slices.ContainsFunc(m.exempt, func(p netip.Prefix) bool { return p.Contains(f.Dst.Addr.Netip()) }) {
		return
	}
	switch {
	case link == "":
		m.applied.missing(notOnOutside, 1)
	case slices.Contains(m.barred, f.ReplyDst.Port):
		m.applied.missing(servedPort, 1)
	}
}
