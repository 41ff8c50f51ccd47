package userrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Config tells a Reader what to read.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current one.
	NetNS int
	// OwnChain is the name of a chain that this program's own tables have. Tables with such
	// a chain are not read.
	OwnChain string
	// Changes returns a number that differs from that of the last call if somebody else
	// changed nftables in between. It may query the kernel over the connection. If Changes
	// is nil, a Reader assumes that every table that it finds changed may still be
	// changing.
	Changes func(*nfnl.Conn) (uint32, error)
}

// A Reader reads the user's rules again and again. It decodes only chains and sets that
// changed; packet counters do not matter. It is not safe for concurrent use.
//
// If somebody changes rules during the reading, it may miss a rule. Then the table is kept
// as torn, together with its last good reading.
type Reader struct {
	cfg    Config
	c      *nfnl.Conn // nil before the first reading
	seed   maphash.Seed
	series uint32 // number of the last series of rule dumps

	last   *Ruleset
	order  []tableKey
	tables map[tableKey]*table
	gone   map[tableKey]bool       // tables that were missing in the last reading
	prints map[tableKey]rulePrints // of all rules, for tables that are dumped in one go
	legacy legacyReader

	fail func(title, chain string) error // for tests; may be nil
}

// NewReader returns a reader. It opens its connection with the first reading.
func NewReader(cfg Config) *Reader {
	r := &Reader{cfg: cfg, seed: maphash.MakeSeed(), prints: map[tableKey]rulePrints{}}
	r.legacy.read = func(f *legacyFamily) ([]rawLegacy, []string, error) { return readLegacy(cfg.NetNS, f, legacyTables...) }
	return r
}

// Close ends the connection.
func (r *Reader) Close() error {
	if r.c == nil {
		return nil
	}
	return r.c.Close()
}

// ErrChanging says that somebody was changing rules while they were read. The next look
// reads them again.
var ErrChanging = nfnl.ErrInterrupted

// A tableKey names a table of nftables.
type tableKey struct {
	family byte
	name   string
}

func (k tableKey) title() string { return nfnl.FamilyName(k.family) + " " + k.name }

// Read reads the rules. It returns the same value as the last time if they did not change.
// If there is no nftables, it returns the rules of iptables-legacy. After an error nothing
// is known. It is not an error if a table, a chain or a set could not be read.
func (r *Reader) Read() (*Ruleset, error) {
	same, err := r.readNFT()
	if err != nil {
		return nil, err
	}
	legacy, hidden, sameLegacy := r.legacy.tables()
	if r.last != nil && same && sameLegacy {
		return r.last, nil
	}
	r.last = &Ruleset{hidden: hidden}
	for _, k := range r.order {
		r.last.tables = append(r.last.tables, r.tables[k])
	}
	r.last.tables = append(r.last.tables, legacy...)
	return r.last, nil
}

// readNFT reads the tables of nftables. It reports whether they are the same as the last
// time.
func (r *Reader) readNFT() (same bool, err error) {
	if r.c == nil {
		if r.c, err = nfnl.Dial(r.cfg.NetNS); err != nil {
			return false, nfnl.Permitted(err)
		}
	}
	before, err := r.changes()
	if err != nil {
		return false, err
	}
	there, err := r.outlines()
	if err != nil {
		return false, err
	}
	var order []tableKey
	tables := map[tableKey]*table{}
	for _, o := range there {
		order = append(order, o.key)
		old := r.tables[o.key]
		if old != nil && old.handle != o.handle {
			// The table was made again: its rules and sets have the numbers and names of
			// the old ones, whatever they contain.
			old = nil
			delete(r.prints, o.key)
		}
		tables[o.key] = r.table(o, old)
	}
	after, err := r.changes()
	if err != nil {
		clear(r.prints) // they describe tables that are thrown away
		return false, err
	}
	gone := map[tableKey]bool{}
	if r.cfg.Changes == nil || before != after {
		for _, o := range there {
			if t := tables[o.key]; t != r.tables[o.key] {
				tables[o.key] = r.settle(o, t)
			}
		}
		for _, k := range r.order {
			if tables[k] == nil && !r.gone[k] { // the list may have missed the table: keep it once
				order, tables[k], gone[k] = append(order, k), r.tables[k], true
			}
		}
	}
	same = slices.Equal(order, r.order)
	for k, t := range tables {
		if old := r.tables[k]; t != old {
			t.follow(old)
			same = false
		}
	}
	for k := range r.prints {
		if tables[k] == nil {
			delete(r.prints, k)
		}
	}
	r.order, r.tables, r.gone = order, tables, gone
	return same, nil
}

func (r *Reader) changes() (uint32, error) {
	if r.cfg.Changes == nil {
		return 0, nil
	}
	n, err := r.cfg.Changes(r.c)
	if isMissing(err) {
		return 0, nil
	}
	return n, err
}

// isMissing reports whether the kernel says that it has no nftables.
func isMissing(err error) bool { return errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) }

// settleReads is how often a changing table is read again at once.
const settleReads = 3

// settle reads a table again that somebody may have changed while it was read, until two
// readings agree.
func (r *Reader) settle(o outline, t *table) *table {
	for range settleReads {
		again := r.table(o, t)
		if again == t {
			return t
		}
		t = again
	}
	t.torn = true
	return t
}

// An outline is a table with its base chains, before its rules are read.
type outline struct {
	key    tableKey
	handle uint64 // of the table
	bases  []base
}

// purposes say what chains are read for.
type purposes uint8

const (
	forDestinations purposes = 1 << iota // which destinations are translated
	forSources                           // which sources are translated
	forVerdicts                          // which packets pass
	forHelpers                           // which flows get a conntrack helper

	anyPurpose = forDestinations | forSources | forVerdicts | forHelpers
)

// purposes returns what a base chain is read for.
func (b *base) purposes() purposes {
	switch {
	case b.kind == "":
	case b.hook == unix.NF_INET_FORWARD:
		return forVerdicts | forHelpers
	case b.kind == natKind && b.hook == unix.NF_INET_PRE_ROUTING:
		return forDestinations | forVerdicts | forHelpers
	case b.kind == natKind && b.hook == unix.NF_INET_POST_ROUTING:
		return forSources
	case b.hook == unix.NF_INET_PRE_ROUTING:
		return forVerdicts | forHelpers
	case b.hook == unix.NF_INET_POST_ROUTING && b.kind != natKind:
		return forHelpers
	}
	return 0
}

// outlines reads the outlines of all tables that matter, except for this program's own
// tables and dormant ones.
func (r *Reader) outlines() (all []outline, err error) {
	skip, handles := map[tableKey]bool{}, map[tableKey]uint64{}
	err = r.dump(unix.NFT_MSG_GETTABLE, unix.AF_UNSPEC, nil, "", func(k tableKey, body []byte) {
		nfnl.Attributes(body, func(typ uint16, b []byte) {
			const dormant = 1 // NFT_TABLE_F_DORMANT
			switch {
			case typ == unix.NFTA_TABLE_FLAGS && number32(b)&dormant != 0:
				skip[k] = true
			case typ == nftaTableHandle && len(b) == 8:
				handles[k] = binary.BigEndian.Uint64(b)
			}
		})
	})
	switch {
	case isMissing(err):
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("list nftables tables: %w", err)
	}
	err = r.dump(unix.NFT_MSG_GETCHAIN, unix.AF_UNSPEC, nil, "", func(k tableKey, body []byte) {
		b := baseOf(body)
		if b.name == r.cfg.OwnChain {
			skip[k] = true
		}
		if nfnl.FamilyName(k.family) == "" || b.purposes() == 0 {
			return
		}
		i := slices.IndexFunc(all, func(o outline) bool { return o.key == k })
		if i < 0 {
			i, all = len(all), append(all, outline{key: k, handle: handles[k]})
		}
		all[i].bases = append(all[i].bases, b)
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	return slices.DeleteFunc(all, func(o outline) bool { return skip[o.key] }), nil
}

const nftaTableHandle = 4 // NFTA_TABLE_HANDLE

// elements returns a hash of the elements of a set that does not depend on their order; it
// is 0 if they could not be read. It calls f with the attributes of each element.
func (r *Reader) elements(k tableKey, set string, f func(b []byte)) (print uint64, err error) {
	err = r.ask(unix.NFT_MSG_GETSETELEM, unix.NLM_F_DUMP, k.family, func(e *nfnl.Encoder) {
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, k.name)
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
	}, func(body []byte) {
		nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
			if typ != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				return
			}
			nfnl.Attributes(b, func(_ uint16, b []byte) {
				var h maphash.Hash
				h.SetSeed(r.seed)
				nfnl.Attributes(b, func(typ uint16, b []byte) {
					if typ != unix.NFTA_SET_ELEM_EXPIRATION && typ != unix.NFTA_SET_ELEM_EXPR && typ != nftaSetElemExpressions {
						_, _ = h.Write(b)
					}
				})
				print += h.Sum64()
				if f != nil {
					f(b)
				}
			})
		})
	})
	if err = uninterrupted(err); err != nil {
		return 0, err
	}
	return max(print, 1), nil
}

// set reads a set, without its elements.
func (r *Reader) set(k tableKey, name string) (s *set) {
	s = &set{failed: fmt.Errorf("set %s: %w", name, unix.ENOENT)}
	err := r.ask(unix.NFT_MSG_GETSET, 0, k.family, func(e *nfnl.Encoder) {
		e.Str(unix.NFTA_SET_TABLE, k.name)
		e.Str(unix.NFTA_SET_NAME, name)
	}, func(body []byte) { s = setOf(body[nfnl.FamilyHeaderLen:]) })
	if err = uninterrupted(err); err != nil {
		s = &set{failed: fmt.Errorf("set %s: %w", name, err)}
	}
	return s
}

// dump is dumpOnce, but accepts an interrupted dump. Read itself finds out whether somebody
// changed something meanwhile: most interruptions come from changes that this program
// makes.
func (r *Reader) dump(typ uint16, family byte, of *tableKey, chain string, f func(k tableKey, attrs []byte)) error {
	return uninterrupted(r.dumpOnce(typ, family, of, chain, f))
}

func uninterrupted(err error) error {
	if errors.Is(err, nfnl.ErrInterrupted) {
		return nil
	}
	return err
}

// dumpOnce calls f with the attributes of each object of a type: of one table, of one of
// its chains if chain is not empty, or of all tables if of is nil.
func (r *Reader) dumpOnce(typ uint16, family byte, of *tableKey, chain string, f func(k tableKey, attrs []byte)) error {
	return r.ask(typ, unix.NLM_F_DUMP, family, func(e *nfnl.Encoder) {
		if of != nil {
			e.Str(unix.NFTA_RULE_TABLE, of.name)
		}
		if chain != "" {
			e.Str(unix.NFTA_RULE_CHAIN, chain)
		}
	}, func(body []byte) {
		attrs := body[nfnl.FamilyHeaderLen:]
		if of != nil {
			f(*of, attrs)
			return
		}
		k := tableKey{family: body[0]}
		nfnl.Attributes(attrs, func(typ uint16, b []byte) {
			if typ == unix.NFTA_TABLE_NAME { // and NFTA_CHAIN_TABLE
				k.name = nfnl.Text(b)
			}
		})
		f(k, attrs)
	})
}

// ask sends a request, with the attributes that names appends, and calls f with each
// answer. An error from the kernel takes precedence over an interruption.
func (r *Reader) ask(typ, flags uint16, family byte, names func(*nfnl.Encoder), f func(body []byte)) error {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, unix.NLM_F_REQUEST|flags, r.c.NextSeq(1), family)
	names(&e)
	e.End()
	return nfnl.Permitted(r.c.Ask(&e, func(_ uint16, body []byte) {
		if len(body) >= nfnl.FamilyHeaderLen {
			f(body)
		}
	}))
}

// rulePrints are the hashes of rules, each with the number of the last series of dumps that
// showed it.
//
// They are a set, because the kernel may put a rule into a dump twice, or leave one out,
// while somebody changes any rule of the table: after each message the kernel finds its
// place again by counting rules from the first, and also counts those of transactions that
// are under way (__nf_tables_dump_rules).
type rulePrints map[uint64]uint32

// equal reports whether p and others are the same rules.
func (p rulePrints) equal(others rulePrints) bool {
	if len(p) != len(others) {
		return false
	}
	for print := range p {
		if _, there := others[print]; !there {
			return false
		}
	}
	return true
}

// dumpsOfRules is how often rules are dumped at most, if dumps are interrupted, until all
// known rules were seen.
const dumpsOfRules = 4

// sameRules reports whether a chain, or the whole table if chain is empty, has exactly the
// rules whose hashes are known. An interrupted dump may leave out known rules, so the dump
// is repeated until all of them were seen. It may also show a rule that one transaction
// adds and deletes again, so one interrupted dump with an unknown rule is ignored.
//
// An interrupted dump may also leave out a new rule. Then somebody's transaction ended
// during the dump, which makes the caller read again.
func (r *Reader) sameRules(k tableKey, chain string, known rulePrints) bool {
	r.series++
	seen, unknown := 0, 0
	for range dumpsOfRules {
		odd := false
		interrupted, err := r.eachRule(k, chain, func(print uint64, _ []byte) {
			switch last, ok := known[print]; {
			case !ok:
				odd = true
			case last != r.series:
				known[print] = r.series
				seen++
			}
		})
		if odd {
			unknown++
		}
		switch {
		case err != nil, unknown > 1, odd && !interrupted:
			return false
		case odd:
		case seen == len(known):
			return true
		case !interrupted:
			return false
		}
	}
	return false
}

// eachRule dumps the rules of a chain once, or of the whole table if chain is empty. It
// calls f for each rule with its hash and its attributes. The hash covers everything except
// packet counters, so handle and position, too. The attributes are valid during the call.
// eachRule reports whether the dump was interrupted.
func (r *Reader) eachRule(k tableKey, chain string, f func(print uint64, body []byte)) (interrupted bool, err error) {
	var h maphash.Hash
	h.SetSeed(r.seed)
	err = r.dumpOnce(unix.NFT_MSG_GETRULE, k.family, &k, chain, func(_ tableKey, body []byte) {
		if !slices.ContainsFunc(counting, func(name []byte) bool { return bytes.Contains(body, name) }) {
			f(maphash.Bytes(r.seed, body), body)
			return
		}
		h.Reset()
		nfnl.Attributes(body, func(typ uint16, b []byte) {
			if typ == unix.NFTA_RULE_EXPRESSIONS {
				nfnl.Attributes(b, func(_ uint16, b []byte) { hashExpression(&h, b) })
			} else {
				_, _ = h.Write(b)
			}
		})
		f(h.Sum64(), body)
	})
	if errors.Is(err, nfnl.ErrInterrupted) {
		return true, nil
	}
	return false, err
}

// counting are the names of expressions whose data changes with each packet.
var counting = [][]byte{[]byte("counter\x00"), []byte("quota\x00"), []byte("last\x00")}

func hashExpression(h *maphash.Hash, b []byte) {
	counts := false
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		if typ == unix.NFTA_EXPR_NAME {
			counts = slices.ContainsFunc(counting, func(name []byte) bool { return bytes.Equal(name, b) })
		}
		if typ == unix.NFTA_EXPR_NAME || !counts {
			_, _ = h.Write(b)
		}
	})
}
