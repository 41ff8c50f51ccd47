package userrules

import (
	"slices"

	"golang.org/x/sys/unix"
)

// proxied adds what rules hand to a transparent proxy: new flows from outside to the gateway. Of the
// conditions of a rule, it takes the same into account as Diversions.
//
// A rule for most of the ports that names no outside link is left out if it has conditions that are
// not evaluated: it is for inside hosts, and they keep it from packets to the gateway.
func (w *walker) proxied() {
	if !w.table.mayProxy() {
		return
	}
	p := &walker{table: w.table, outside: w.outside, seen: map[string]bool{}, first: &firstPacket{dest: unix.RTN_LOCAL}}
	p.translates = func(*rule, []condition) {}
	p.finds = statement.proxies
	p.helps = func(r *rule, conds []condition) {
		for _, all := range conds {
			if all.wide && !all.tested && mostPorts(orEvery(all.ports)) {
				continue
			}
			for _, c := range w.byAddr(all) {
				f := c.forward(r.title(w.table) + " (transparent proxy)")
				f.Proxied = true
				w.add(f)
			}
		}
	}
	for _, b := range w.table.of(unix.NF_INET_PRE_ROUTING, "") {
		p.accepted = letPass{}
		p.chain(b.name, condition{family: w.table.family}, 0)
	}
	for _, f := range p.found { // what cannot be read or followed
		w.add(f)
	}
}

// mayProxy reports whether a rule may hand packets that arrive to a transparent proxy.
func (t *table) mayProxy() bool {
	if len(t.of(unix.NF_INET_PRE_ROUTING, "")) == 0 {
		return false
	}
	for _, c := range t.chains {
		if c.proxies || c.failed != nil {
			return true
		}
	}
	for _, s := range t.sets {
		if s.failed != nil { // it may lead to chains
			return true
		}
	}
	return t.readable != nil && t.readable.mayProxy()
}

// proxies reports whether the rule hands packets to a transparent proxy.
func (r *rule) proxies() bool { return slices.ContainsFunc(r.statements, statement.proxies) }
