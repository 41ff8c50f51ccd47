package userrules

import (
	"sync"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A Ruleset is what was read of the user's rules at one time: those of nftables, including
// iptables-nft, and those of iptables-legacy. It has the tables with a chain of the
// prerouting or forward hook or a NAT chain of postrouting, with the rules that
// packets can reach from these chains, and the sets and maps that matter for them. It is
// not changed once read. Its methods read nothing from the kernel, so they may be called
// from any goroutine.
//
// It records what could not be read or was not understood: an answer that depends on such a
// part is "unknown", never "no".
type Ruleset struct {
	tables []*table // nftables first
	hidden []hiddenTable

	// What they do to sources: each look asks for it several times.
	sourcesFound    sync.Once
	sources, exempt []SourceNAT
}

// A hiddenTable is a table of iptables-legacy that may exist: only root and its group can see
// which tables there are.
type hiddenTable struct {
	family *legacyFamily
	name   string
}

func (rs *Ruleset) hides(f *legacyFamily, name string) bool {
	for _, h := range rs.hidden {
		if h.family == f && h.name == name {
			return true
		}
	}
	return false
}

// A table is what was read of one table. It is not changed once read.
type table struct {
	title  string // as users name it: "ip nat" or "iptables-legacy nat"
	name   string
	family byte
	handle uint64        // nftables only; the kernel never uses a handle twice
	legacy *legacyFamily // nil for nftables
	bases  []base
	chains map[string]*chain
	sets   map[string]*set // the sets that rules look up, by name
	failed error           // why nothing is known of it; iptables-legacy only
	// refused says that the kernel did not return the table. If failed is set without
	// refused, the table is not understood.
	refused bool
	// torn says that somebody changed the table while it was read: its rules may never have
	// existed together, and some may have been missed.
	torn bool
	// Earlier readings, if this one is torn or incomplete: readable is the last reading in
	// which nothing was unreadable, whole the last that was not torn either. They have no
	// earlier readings themselves.
	readable, whole *table

	print uint64 // hash of a table of iptables-legacy
}

// A base is a chain that packets reach from a hook.
type base struct {
	name     string
	kind     string // "nat", "filter" or "route"
	hook     uint32
	priority int32
	drops    bool   // its policy is drop
	handle   uint64 // 0 in iptables-legacy
}

// A chain is what was read of a chain.
type chain struct {
	rules  []rule
	failed error  // why its rules could not be read
	odd    string // what is not understood in one of its rules, if anything
	// proxies says that one of them hands packets to a transparent proxy.
	proxies bool

	lookups []lookup
	jumps   []string
	prints  rulePrints
}

// A rule is one rule of a chain.
type rule struct {
	chain      string
	handle     uint64 // nftables only
	number     int    // iptables-legacy only, from 1 on
	comment    string
	spec       []string // iptables-legacy only, of a rule with notrack: see spec
	statements []statement
}

// A statement is an expression of a rule.
type statement struct {
	name string
	expr expr.Any // nil if it is not needed or not understood
}

// A set is what was read of a set or map.
type set struct {
	fields   []int // sizes of the parts of a concatenated key, without padding
	size     int   // of a key
	verdicts bool
	objects  uint32 // the type of the objects of a map of objects; 0 for others
	interval bool
	named    bool
	changing bool  // packets add elements, or elements expire
	failed   error // why it could not be read
	loaded   bool  // all elements were read
	long     bool  // the elements were not kept, because they are many
	elements []element
	print    uint64 // hash of the elements
}

// fixed reports whether packets cannot add elements. They never can to an interval set,
// whatever its flags.
func (s *set) fixed() bool { return !s.changing && (!s.named || s.interval) }

// An element has the keys in its span and, in a map, the verdict or the value for packets with
// them. The catch-all element comes last.
type element struct {
	span
	others  bool // it has all keys that no other element has
	verdict expr.Verdict
	value   []byte
}

// unread reports whether something of the table could not be read.
func (t *table) unread() bool {
	if t.failed != nil {
		return true
	}
	for _, c := range t.chains {
		if c.failed != nil {
			return true
		}
	}
	for _, s := range t.sets {
		if s.failed != nil {
			return true
		}
	}
	return false
}

// settled returns the last reading of the table that was consistent, if there is one,
// otherwise the table as it is.
func (t *table) settled() *table {
	if t.torn && t.whole != nil {
		return t.whole
	}
	return t
}

// follow keeps the earlier readings of the table. old is nil for a new table.
func (t *table) follow(old *table) {
	if old == nil || !t.torn && !t.unread() {
		return
	}
	t.readable, t.whole = old.readable, old.whole
	if old.unread() {
		return
	}
	last := *old
	last.readable, last.whole = nil, nil
	if t.readable = &last; !last.torn {
		t.whole = &last
	}
}

// of returns the base chains of a hook, and of a kind if kind is not empty.
func (t *table) of(hook uint32, kind string) (bases []base) {
	for _, b := range t.bases {
		if b.hook == hook && (kind == "" || b.kind == kind) {
			bases = append(bases, b)
		}
	}
	return bases
}

// has reports whether packets of a family reach the table.
func (t *table) has(family byte) bool { return t.family == family || t.family == unix.NFPROTO_INET }

// natKind is the type of chains that translate packets.
const natKind = "nat"
