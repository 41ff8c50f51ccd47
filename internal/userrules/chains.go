package userrules

import "golang.org/x/sys/unix"

// A Chain is one of the user's base chains.
type Chain struct {
	Table    string // with the family or program: "ip nat" or "iptables-legacy nat"
	Name     string
	Type     string // "nat", "filter" or "route"
	Hook     string // "prerouting", "forward" or "postrouting"
	Priority int
	Drops    bool // its policy is drop
	// Handles are those of its table and of the chain. A table or chain that is made again
	// gets a new handle.
	Handles [2]uint64
}

// String names the chain as nft does.
func (c Chain) String() string { return c.Table + " " + c.Name }

var hookNames = map[uint32]string{
	unix.NF_INET_PRE_ROUTING: "prerouting", unix.NF_INET_FORWARD: "forward", unix.NF_INET_POST_ROUTING: "postrouting",
}

// Chains returns the chains that a Reader reads: those of the prerouting and forward hooks, and
// the NAT chains of postrouting.
func (rs *Ruleset) Chains() (all []Chain) {
	for _, t := range rs.tables {
		for _, b := range t.bases {
			if b.purposes()&^forHelpers != 0 { // iptables-legacy has other chains, too
				all = append(all, t.named([]base{b})...)
			}
		}
	}
	return all
}

// SourceNATChains returns the chains that may translate the sources of IPv4 packets.
func (rs *Ruleset) SourceNATChains() (all []Chain) {
	for _, t := range rs.sourceTables(unix.NFPROTO_IPV4) {
		all = append(all, t.named(t.of(unix.NF_INET_POST_ROUTING, natKind))...)
	}
	return all
}

// named returns base chains of the table as users know them.
func (t *table) named(bases []base) (all []Chain) {
	for _, b := range bases {
		all = append(all, Chain{
			Table: t.title, Name: b.name, Type: b.kind, Hook: hookNames[b.hook], Priority: int(b.priority), Drops: b.drops,
			Handles: [2]uint64{t.handle, b.handle},
		})
	}
	return all
}
