package userrules

import (
	"slices"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// MayMark reports whether a rule of the prerouting hook may give IPv4 packets a mark before they
// are routed. It is true, too, if rules are not understood or may be missing. Chains of the
// families netdev and bridge are not read.
func (rs *Ruleset) MayMark() bool {
	if slices.ContainsFunc(rs.hidden, func(h hiddenTable) bool { return h.family == legacy4 }) {
		return true
	}
	return slices.ContainsFunc(rs.tables, func(t *table) bool {
		if !t.has(unix.NFPROTO_IPV4) {
			return false
		}
		seen := make(map[string]bool)
		return t.failed != nil || t.torn || slices.ContainsFunc(t.bases, func(b base) bool {
			return b.hook == unix.NF_INET_PRE_ROUTING && t.mayMark(b.name, seen)
		})
	})
}

// mayMark is MayMark for a chain, and the chains that packets reach from it.
func (t *table) mayMark(name string, seen map[string]bool) bool {
	c := t.chains[name]
	if c == nil || seen[name] {
		return false
	}
	seen[name] = true
	if c.failed != nil || c.odd != "" || slices.ContainsFunc(c.rules, rule.marks) {
		return true
	}
	follow := func(chain string) bool { return t.mayMark(chain, seen) }
	return slices.ContainsFunc(c.jumps, follow) || slices.ContainsFunc(c.lookups, func(l lookup) bool {
		s := t.sets[l.set]
		return l.verdicts && s != nil && (!s.loaded || slices.ContainsFunc(s.elements, func(e element) bool { return follow(e.verdict.Chain) }))
	})
}

func (r rule) marks() bool {
	return slices.ContainsFunc(r.statements, func(s statement) bool {
		switch e := s.expr.(type) {
		case *expr.Meta:
			return e.SourceRegister && e.Key == expr.MetaKeyMARK
		case *expr.Target:
			return slices.Contains(markTargets, e.Name)
		}
		return false
	})
}

// markTargets are the targets of iptables that may change a packet's mark.
var markTargets = []string{"MARK", "CONNMARK", "HMARK", "SET", "TPROXY"}
