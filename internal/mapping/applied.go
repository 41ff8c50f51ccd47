package mapping

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// An Unmapped is the identifier (docs/control.md) of the reason why a flow of a host with
// mappings does not use its mapping.
type Unmapped string

const (
	NotOnOutside Unmapped = "address_not_outside"
	ServedPort   Unmapped = "port_in_use" // by a socket of the gateway or a forward
	OlderFlow    Unmapped = "older_flow"  // the flow is older than the daemon
	OldAddress   Unmapped = "old_address" // the user's rules give its host another address now
	OtherMapping Unmapped = "other_endpoint"
	SharedPort   Unmapped = "port_shared" // with another host, whose mapping has the port
	OtherZone    Unmapped = "conntrack_zone"
)

// Applied counts the living flows that use their mapping, and says why others do not.
type Applied struct {
	flows uint64
	not   map[string]uint64

	misfits map[uint32]bool // IDs of flows with another outside endpoint than their mapping; true: older than us
	fresh   uint64          // misfits that the previous look did not have
	left    uint64          // flows that our rules left to the user's rules so far
	odd     uint64          // fresh misfits that left does not explain
}

func (a *Applied) missing(why Unmapped, n int) {
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
func (a *Applied) misfit(before *Applied, ids []uint32) {
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
		why := OtherMapping
		if older {
			why = OlderFlow
		}
		a.missing(why, 1)
	}
}

// settle ends a look; before is the previous one. Our rules count the flows that they leave
// to the user's rules, which explains as many misfits. It subtracts them also from the
// misfits of the previous look, since some may have been counted only after left was read.
func (a *Applied) settle(before *Applied, left uint64) {
	if a.misfits == nil {
		a.misfits = make(map[uint32]bool)
	}
	a.left = left
	explained := a.left - min(a.left, before.left)
	a.odd = before.odd + a.fresh
	a.odd -= min(a.odd, explained)
}

// fewMisfits is how many flows it takes to rule out chance.
const fewMisfits = 3

// NotInForce reports whether most flows get no mapping, and our rules do not explain it.
func (a *Applied) NotInForce() bool { return a.odd >= fewMisfits && a.Sum() > a.flows }

// Not returns how many flows do not use their mapping, by the identifier of the reason.
func (a *Applied) Not() map[string]uint64 { return maps.Clone(a.not) }

// Sum returns how many these are in all.
func (a *Applied) Sum() (n uint64) {
	for _, m := range a.not {
		n += m
	}
	return n
}

// check notes why f, which has no mapping, can get none. A flow to an exempt address needs
// none.
func (m *Mapper) check(f *cone.Flow, link string) {
	if !f.Status.Has(cone.StatusSrcNAT) || f.Status.Has(cone.StatusDstNAT) || !m.Inside(f.Src.Addr) || slices.ContainsFunc(m.Exempt, func(p netip.Prefix) bool { return p.Contains(f.Dst.Addr.Netip()) }) {
		return
	}
	switch {
	case f.ReplyZone != 0 || f.OrigZone != 0 && !m.Zoned:
		m.applied.missing(OtherZone, 1)
	case link == "":
		m.applied.missing(NotOnOutside, 1)
	case m.isBarred(f.ReplyDst.Port):
		m.applied.missing(ServedPort, 1)
	case !m.Given.may(link, f.Src.Addr, f.ReplyDst.Addr):
		m.applied.missing(OldAddress, 1)
	}
}
