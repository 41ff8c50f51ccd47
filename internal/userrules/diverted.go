package userrules

import (
	"bytes"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// A Diversion is what a rule takes from inside hosts: new UDP flows to some ports, which it
// translates to another destination, or gives to a conntrack helper.
type Diversion struct {
	Ports []PortRange    // of the peers
	Peers []netip.Prefix // nil stands for any
	Text  string         // names the rule, as in a Forward
}

// Takes reports whether the rule takes what hosts send to a peer.
func (d Diversion) Takes(peer netip.AddrPort) bool {
	return covers(d.Ports, peer.Port()) &&
		(d.Peers == nil || slices.ContainsFunc(d.Peers, func(p netip.Prefix) bool { return p.Contains(peer.Addr()) }))
}

// A Diverter finds the diversions in one Ruleset after the other. It looks only at tables that
// changed. The zero value is ready for use.
type Diverter struct {
	inside, outside []Link
	found           map[*table][]Diversion
}

// Diversions returns the diversions of UDP packets that come in by one of the links inside, at
// the prerouting hook. It leaves out rules that take all ports, or that test something else
// than addresses, ports and links, since they may be for other packets: those to the gateway
// itself, for instance. And it leaves out translations that concern packets from the links
// outside as well: they are port forwards.
func (d *Diverter) Diversions(rs *Ruleset, inside, outside []Link) (all []Diversion) {
	before := d.found
	if !slices.Equal(d.inside, inside) || !slices.Equal(d.outside, outside) {
		before = nil
	}
	d.inside, d.outside, d.found = slices.Clone(inside), slices.Clone(outside), make(map[*table][]Diversion)
	for _, t := range rs.tables {
		found, known := before[t]
		if !known {
			found = t.diversions(inside, outside)
		}
		d.found[t] = found
		all = append(all, found...)
	}
	return all
}

func (t *table) diversions(inside, outside []Link) (found []Diversion) {
	if t = t.settled(); t.failed != nil {
		return nil
	}
	forwards := make(map[string]bool)
	w := &walker{table: t, outside: inside, seen: map[string]bool{}}
	note := func(helps bool) func(r *rule, conds []condition) {
		return func(r *rule, conds []condition) {
			title := r.title(t)
			if !helps && forwards[title] {
				return
			}
			for _, c := range conds {
				if c.asks || c.unknown || c.ports == nil {
					continue
				}
				x := Diversion{Ports: c.ports, Text: title}
				for _, r := range c.addrs {
					x.Peers = append(x.Peers, r.prefixes()...)
				}
				found = append(found, x)
			}
		}
	}
	w.translates, w.helps = note(false), note(true)
	for _, b := range t.of(unix.NF_INET_PRE_ROUTING, "") {
		if b.kind == natKind && len(forwards) == 0 {
			ports := &walker{table: t, outside: outside, seen: map[string]bool{}}
			ports.translates = func(r *rule, conds []condition) {
				if len(conds) > 0 {
					forwards[r.title(t)] = true
				}
			}
			for _, nat := range t.of(unix.NF_INET_PRE_ROUTING, natKind) {
				ports.chain(nat.name, condition{family: t.family}, 0)
			}
		}
		w.chain(b.name, condition{family: t.family}, 0)
	}
	return found
}

// givesHelper reports whether the statement gives flows a conntrack helper: "ct helper set" of
// nft, or the target CT of iptables.
func (s statement) givesHelper() bool {
	switch e := s.expr.(type) {
	case *expr.Objref:
		return e.Type == objectCtHelper
	case *expr.Target:
		info, ok := e.Info.(*xt.Unknown)
		return ok && e.Name == "CT" && len(*info) >= ctHelperEnd && !bytes.HasPrefix((*info)[ctHelper:], []byte{0})
	}
	return false
}

const (
	objectCtHelper = 3 // NFT_OBJECT_CT_HELPER

	// The name of the helper in struct xt_ct_target_info, in all revisions.
	ctHelper    = 12
	ctHelperEnd = ctHelper + 16
)
