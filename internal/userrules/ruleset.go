package userrules

import (
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// A Ruleset is what was read of the user's rules at one time: those of nftables, and with
// them those of iptables-nft, and those of iptables-legacy. It has the tables with a NAT
// chain of the prerouting or postrouting hook or a chain of the forward hook, with the
// rules that packets can get to from these chains, and the sets and maps that matter for
// them. It is not changed once read, and its methods read nothing, so that they may be
// called from any goroutine.
//
// What could not be read, or was not understood, is in it as such: an answer that depends
// on it is "unknown", never "no".
type Ruleset struct {
	tables []*table // those of nftables first
	hidden []hiddenTable
}

// A hiddenTable is a table of iptables-legacy that there may be: another user than root
// may not know which there are.
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
	handle uint64        // of nftables: that of no other table, before or after
	legacy *legacyFamily // nil for nftables
	bases  []base
	chains map[string]*chain
	sets   map[string]*set // by name, those that rules look up
	failed error           // why nothing is known of it; of iptables-legacy alone
	// refused says that the kernel did not show the table; otherwise what it shows is not
	// understood.
	refused bool
	// torn says that somebody changed the table while it was read: the rules in it may
	// never have stood together, and some may have been missed.
	torn bool
	// What was read before, where this is torn or not all: the last reading in which
	// nothing was unreadable, and the last that was not torn either. They have no
	// predecessors themselves.
	readable, whole *table

	print uint64 // of a table of iptables-legacy
}

// A base is a chain that packets get to by a hook.
type base struct {
	name     string
	kind     string // "nat", "filter" or "route"
	hook     uint32
	priority int32
	drops    bool   // its policy
	handle   uint64 // 0 in iptables-legacy
}

// A chain is what was read of a chain.
type chain struct {
	rules  []rule
	failed error  // why its rules could not be read
	odd    string // what is not understood in one of its rules; empty if nothing is

	lookups []lookup
	jumps   []string
	prints  rulePrints
}

// A rule is one rule of a chain.
type rule struct {
	chain      string
	handle     uint64 // of nftables
	number     int    // of iptables-legacy, from 1 on
	comment    string
	statements []statement
}

// A statement is an expression of a rule.
type statement struct {
	name string
	expr expr.Any // nil where nothing of it is needed or understood
}

// A set is what was read of a set or map.
type set struct {
	fields   []int // sizes of the parts of a concatenated key, without padding
	size     int   // of a key
	verdicts bool
	interval bool
	named    bool
	changing bool  // packets add elements, or these expire
	failed   error // why it could not be read
	loaded   bool  // all elements are there
	long     bool  // they are not, for they are many
	elements []element
	print    uint64 // of the elements
}

// fixed reports whether packets cannot add elements: the kernel has no interval set that
// they may, whatever its flags.
func (s *set) fixed() bool { return !s.changing && (!s.named || s.interval) }

// An element has the keys in its span, and, in a map of verdicts, what becomes of
// packets with them. The one for all other keys comes last.
type element struct {
	span
	others  bool // it has all keys that no other one has
	verdict expr.Verdict
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

// settled returns the table as it stood at one time, if that is known, otherwise the
// table as it is.
func (t *table) settled() *table {
	if t.torn && t.whole != nil {
		return t.whole
	}
	return t
}

// follow notes what was read before, which is nil for a new table.
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

// of returns those of the base chains that are of a hook, and of a kind if that is not
// empty.
func (t *table) of(hook uint32, kind string) (bases []base) {
	for _, b := range t.bases {
		if b.hook == hook && (kind == "" || b.kind == kind) {
			bases = append(bases, b)
		}
	}
	return bases
}

// has reports whether packets of a family get to the table.
func (t *table) has(family byte) bool { return t.family == family || t.family == unix.NFPROTO_INET }

// natKind is the type of chains that translate.
const natKind = "nat"
