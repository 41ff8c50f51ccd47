package daemon

import (
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
)

// An unmapped is the identifier (docs/control.md) of why a flow of a host with mappings is
// without its own.
type unmapped string

const (
	notOnOutside unmapped = "address_not_outside"
	servedPort   unmapped = "port_in_use" // by a socket of the gateway or a forward
	olderFlow    unmapped = "older_flow"  // it is older than the daemon
	otherMapping unmapped = "other_endpoint"
	sharedPort   unmapped = "port_shared" // with a host that has it as its mapping
	otherZone    unmapped = "conntrack_zone"
)

// applied says how many living flows have their mapping and why others have none.
type applied struct {
	flows uint64
	not   map[string]uint64

	misfits map[uint32]bool // flows with another outside endpoint than their mapping: whether older than conenatd
	fresh   uint64          // of these, those that were not there at the look before
	left    uint64          // flows that our rules left to the user's, until now
	odd     uint64          // fresh ones beyond those that our rules left
}

func (a *applied) missing(why unmapped, n int) {
	if n == 0 {
		return
	}
	if a.not == nil {
		a.not = make(map[string]uint64)
	}
	a.not[string(why)] += uint64(n)
}

// misfit takes in flows with another outside endpoint than their mapping. before is
// the look before, if there was one.
func (a *applied) misfit(before *applied, ids []uint32) {
	if a.misfits == nil {
		a.misfits = make(map[uint32]bool)
	}
	for _, id := range ids {
		older, known := before.misfits[id]
		if !known {
			older = before.misfits == nil // at the first look
			if !older {
				a.fresh++
			}
		}
		a.misfits[id] = older
		why := otherMapping
		if older {
			why = olderFlow
		}
		a.missing(why, 1)
	}
}

// settle ends a look, after the one before. What our rules left to the user's they
// counted, some of it perhaps after m was read.
func (a *applied) settle(before *applied, m control.Mapping) {
	if a.misfits == nil {
		a.misfits = make(map[uint32]bool)
	}
	a.left = m.Left + m.PoolUsedUp
	explained := a.left - min(a.left, before.left)
	a.odd = before.odd + a.fresh
	a.odd -= min(a.odd, explained)
}

// notInForce reports whether most flows get no mapping, and our rules do not know why.
func (a *applied) notInForce() bool { return a.odd >= fewFlows && a.sum() > a.flows }

func (a *applied) sum() (n uint64) {
	for _, m := range a.not {
		n += m
	}
	return n
}

// check notes why f, which has no mapping, can get none. What goes to an address that
// is exempt needs none.
func (m *mapper) check(f *cone.Flow, link string) {
	if !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !m.inside(f.Src.Addr) || within(m.exempt, f.Dst.Addr) {
		return
	}
	switch {
	case f.ReplyZone != 0 || f.OrigZone != 0 && !m.zoned:
		m.applied.missing(otherZone, 1)
	case link == "":
		m.applied.missing(notOnOutside, 1)
	case m.bars(f.ReplyDst.Port):
		m.applied.missing(servedPort, 1)
	}
}
