package rules

import (
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Diversion is what a rule of the user's takes from inside hosts: new flows to ports of peers,
// which it redirects or gives a conntrack helper. All that a host sends to the peer's port of a
// child belongs to the child's flow, so that the rule would not see it: no child gets in from
// there.
type Diversion struct {
	Hosts, Peers cone.AddrRanges // nil stands for all
	Ports        cone.PortRanges // of the peers
}

const (
	divertedSet     = "diverted" // and what of which diversion
	divertedCounter = "diverted_drops"
)

// divertsAdmitted reports whether children of the map are judged by Diverted in the forward hook,
// where their hosts are known. Only their label tells them from the flows of the user's forwards.
func (d *Desired) divertsAdmitted() bool {
	return len(d.Diverted) > 0 && d.Map != nil && !d.Map.noLabels
}

// divert adds rules to c that end with verdict for the first packets of such children. Packets
// that were not translated yet have no host: then hosts is false.
func (l *layout) divert(c *nftables.Chain, all []Diversion, families []*ipFamily, hosts bool, verdict exprs) {
	for i, d := range all {
		for _, f := range families {
			if !f.among(d.Hosts) || !f.among(d.Peers) {
				continue
			}
			is, to := f.is, exprs(nil)
			if l.table.Family == nftables.TableFamilyIPv4 {
				is = nil
			}
			if hosts { // those of an earlier diversion may be the same, and many
				same := slices.IndexFunc(all, func(o Diversion) bool { return slices.Equal(o.Hosts, d.Hosts) })
				to = l.addrIn(f.daddr, fmt.Sprintf("%s_hosts%s_%d", divertedSet, f.name, same), f, d.Hosts)
			}
			same := slices.IndexFunc(all, func(o Diversion) bool { return slices.Equal(o.Peers, d.Peers) })
			from := l.addrIn(f.saddr, fmt.Sprintf("%s_peers%s_%d", divertedSet, f.name, same), f, d.Peers)
			ports := l.portSet(fmt.Sprintf("%s_ports_%d", divertedSet, i), d.Ports)
			l.rule(c, "your rules take what the host sends to that port", is, to, from, udpSport.in(ports), isUDP, verdict)
		}
	}
}

// among reports whether addresses of the family are among the ranges. No ranges stand for all
// addresses.
func (f *ipFamily) among(all cone.AddrRanges) bool {
	return len(all) == 0 || slices.ContainsFunc(all, f.has)
}

func (f *ipFamily) has(r cone.AddrRange) bool { return r.First.BitLen() == 8*f.size }

// addrIn compares an address of a packet with the set of that name, which has those ranges that
// are of the family. It is empty if these are all addresses.
func (l *layout) addrIn(addr operand, name string, f *ipFamily, all cone.AddrRanges) exprs {
	if len(all) == 0 || slices.ContainsFunc(all, func(r cone.AddrRange) bool {
		return f.has(r) && r.First.IsUnspecified() && !r.Last.Next().IsValid()
	}) {
		return nil
	}
	s := l.named(name)
	if s == nil {
		s = l.set(name, f.addr)
		s.Interval, s.elements = true, f.rangeIntervals(all)
	}
	return addr.in(s)
}

// portSet returns the set with that name, which has the ports.
func (l *layout) portSet(name string, ranges cone.PortRanges) *set {
	s := l.named(name)
	if s == nil {
		s = l.set(name, nftables.TypeInetService)
		s.setPortRanges(ranges)
	}
	return s
}
