package daemon

import (
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
)

// An unmapped is the identifier (docs/control.md) of the reason why a flow of a host with
// mappings does not use its mapping.
type unmapped string

const (
	notOnOutside unmapped = "address_not_outside"
	servedPort   unmapped = "port_in_use" // by a socket of the gateway or a forward
	olderFlow    unmapped = "older_flow"  // the flow is older than the daemon
	oldAddress   unmapped = "old_address" // the user's rules give its host another address now
	otherMapping unmapped = "other_endpoint"
	sharedPort   unmapped = "port_shared" // with another host, whose mapping has the port
	otherZone    unmapped = "conntrack_zone"
)

// applied counts the living flows that use their mapping, and says why others do not.
type applied struct {
	flows uint64
	not   map[string]uint64

	misfits map[uint32]bool // IDs of flows with another outside endpoint than their mapping; true: older than us
	fresh   uint64          // misfits that the previous look did not have
	left    uint64          // flows that our rules left to the user's rules so far
	odd     uint64          // fresh misfits that left does not explain
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

// misfit takes in flows whose outside endpoint is not that of their mapping. before is
// the previous look, if there was one.
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

// settle ends a look; before is the previous one. Our rules count the flows that they leave
// to the user's rules, which explains as many misfits. It subtracts them also from the
// misfits of the previous look, since some may have been counted only after m was read.
func (a *applied) settle(before *applied, m control.Mapping) {
	if a.misfits == nil {
		a.misfits = make(map[uint32]bool)
	}
	a.left = m.Left + m.PoolUsedUp
	explained := a.left - min(a.left, before.left)
	a.odd = before.odd + a.fresh
	a.odd -= min(a.odd, explained)
}

// notInForce reports whether most flows get no mapping, and our rules do not explain it.
func (a *applied) notInForce() bool { return a.odd >= fewFlows && a.sum() > a.flows }

func (a *applied) sum() (n uint64) {
	for _, m := range a.not {
		n += m
	}
	return n
}

// check notes why f, which has no mapping, can get none. A flow to an exempt address needs
// none.
func (m *mapper) check(f *cone.Flow, link string) {
	if !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !m.inside(f.Src.Addr) || within(m.exempt, f.Dst.Addr) {
		return
	}
	switch {
	case f.ReplyZone != 0 || f.OrigZone != 0 && !m.zoned:
		m.applied.missing(otherZone, 1)
	case link == "":
		m.applied.missing(notOnOutside, 1)
	case m.isBarred(f.ReplyDst.Port):
		m.applied.missing(servedPort, 1)
	case !m.given.may(link, f.Src.Addr, f.ReplyDst.Addr):
		m.applied.missing(oldAddress, 1)
	}
}
