//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// A ForwardReader reads what the user's rules forward again and again, as Forwards
// does. It decodes only those tables whose rules, or elements that they ask for, are
// others than before; counters do not matter. It is not safe for concurrent use.
//
// What it cannot read is never taken for nothing: a Forward that is Unknown stands
// for it, and what it read there the last time for what may be behind it. A rule that
// somebody changes beside the reading may be missed by it, but not one that was read
// the last time.
type ForwardReader struct {
	netns   int
	w       *writer // tells transactions of ours from those of others; may be nil
	c       *conn
	raw     *nfnl.Conn
	outside []Link
	tables  map[tableKey]*readTable
	legacy  map[*legacyFamily]*readLegacyTable
	hidden  bool
	seed    maphash.Seed
	series  uint32                               // the last one of dumps of rules
	fail    func(k tableKey, chain string) error // of tests; may be nil
}

// NewForwardReader returns a reader of the network namespace of t, which must not be
// closed before it.
func (t *Tables) NewForwardReader() *ForwardReader { return &ForwardReader{netns: t.netns, w: t.w} }

// Close ends the connections.
func (r *ForwardReader) Close() error {
	var errs []error
	if r.c != nil {
		errs = append(errs, r.c.CloseLasting())
	}
	if r.raw != nil {
		errs = append(errs, r.raw.Close())
	}
	return errors.Join(errs...)
}

type tableKey struct {
	family nftables.TableFamily
	name   string
}

func (k tableKey) String() string { return familyOf(k.family) + " " + k.name }

// A readTable is what was read of one table.
type readTable struct {
	rules rulePrints        // of its rules
	sets  map[string]uint64 // those that its rules ask, and their prints
	alone []Forward         // what the last reading found that could read it all
	found []Forward         // the same, and what may have been missed
	again bool              // it has to be decoded in any case
	gone  bool              // it was not there the last time
}

// Read reads the forwards. It reports whether they are the same as the last time,
// for the same links. With an error nothing is known.
func (r *ForwardReader) Read(outside []Link) (found []Forward, same bool, err error) {
	if err := r.open(); err != nil {
		return nil, false, err
	}
	before, err := r.changes()
	if err != nil {
		return nil, false, err
	}
	outlines, err := r.outlines()
	if err != nil {
		return nil, false, err
	}
	same = r.tables != nil && slices.Equal(r.outside, outside)
	if !same {
		r.tables, r.legacy, r.outside = map[tableKey]*readTable{}, map[*legacyFamily]*readLegacyTable{}, slices.Clone(outside)
	}
	var decoded []*decoding
	for k, o := range outlines {
		t := r.tables[k]
		if t == nil {
			t = &readTable{again: true}
			r.tables[k] = t
		}
		t.gone = false
		if !t.again && r.unchanged(k, t) {
			continue
		}
		same = false
		t.rules, err = r.rules(k)
		decoded = append(decoded, r.decode(k, t, o, err))
	}
	after, err := r.changes()
	if err != nil {
		return nil, false, err
	}
	torn := before != after
	for k, t := range r.tables {
		if outlines[k] != nil {
			continue
		}
		if same = false; torn && !t.gone {
			t.gone = true // or it was missed
		} else {
			delete(r.tables, k)
		}
	}
	for _, d := range decoded {
		d.take(torn && !r.unchanged(d.k, d.t))
	}
	for _, k := range r.keys() {
		found = append(found, r.tables[k].found...)
	}
	more, sameLegacy := r.readLegacy()
	return append(found, more...), same && sameLegacy, nil
}

// keys returns the tables in order.
func (r *ForwardReader) keys() (keys []tableKey) {
	for k := range r.tables {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b tableKey) int { return slices.Compare([]byte(a.String()), []byte(b.String())) })
	return keys
}

func (r *ForwardReader) open() (err error) {
	if r.c == nil {
		if r.c, err = dial(r.netns); err != nil {
			return err
		}
	}
	if r.raw == nil {
		r.seed = maphash.MakeSeed()
		r.raw, err = nfnl.Dial(r.netns)
	}
	return err
}

// changes returns a number that is another one when somebody else changed something.
func (r *ForwardReader) changes() (uint32, error) {
	if r.w != nil {
		return r.w.Others(r.raw)
	}
	return elements.Generation(r.raw)
}

// A decoding is a new reading of a table.
type decoding struct {
	*walker
	k tableKey
	t *readTable
}

// decode walks through the rules of a table. Its outline was read before, and failed
// says why its rules could not be.
func (r *ForwardReader) decode(k tableKey, t *readTable, o *outline, failed error) *decoding {
	foreign, err := r.foreign(k)
	failed = errors.Join(failed, err)
	w := &walker{
		c: r.c, table: &nftables.Table{Name: k.name, Family: k.family}, title: k.String(), outside: r.outside, foreign: foreign,
		print: func(set string) uint64 { return r.elements(k, set) },
		rules: map[string][]*nftables.Rule{}, sets: map[string]*elementSet{}, seen: map[string]bool{},
	}
	if r.fail != nil {
		w.fail = func(chain string) error { return r.fail(k, chain) }
	}
	if in := (condition{family: byte(k.family)}); failed != nil {
		w.unread = true
		w.opaque(in, failed.Error())
	} else {
		for _, chain := range o.bases {
			w.chain(chain, in, 0)
		}
	}
	t.sets = map[string]uint64{}
	for name, s := range w.sets {
		if s.loaded {
			t.sets[name] = s.print
		}
		w.unread = w.unread || s.unknown
	}
	return &decoding{w, k, t}
}

// take puts what was found in the place of what was before. Where something may have
// been missed, that stays for once.
func (d *decoding) take(torn bool) {
	before := d.t.alone
	if !d.unread {
		d.t.alone = slices.Clip(d.found)
	}
	if d.t.again = torn || d.unread; d.t.again {
		for _, f := range before {
			d.add(f)
		}
	}
	d.t.found = d.found
}

// An outline is what the chains of a table say, where one of them is for new packets
// to be translated.
type outline struct{ bases []string }

// outlines reads those of all tables but ours and those that are dormant.
func (r *ForwardReader) outlines() (map[tableKey]*outline, error) {
	skip := map[tableKey]bool{}
	err := r.dump(unix.NFT_MSG_GETTABLE, unix.AF_UNSPEC, nil, func(k tableKey, body []byte) {
		nfnl.Attributes(body, func(typ uint16, b []byte) {
			if typ == unix.NFTA_TABLE_FLAGS && len(b) == 4 && binary.BigEndian.Uint32(b)&uint32(nftables.TableFlagDormant) != 0 {
				skip[k] = true
			}
		})
	})
	if err := listError("tables", err); err != nil {
		return nil, err
	}
	all := map[tableKey]*outline{}
	err = r.dump(unix.NFT_MSG_GETCHAIN, unix.AF_UNSPEC, nil, func(k tableKey, body []byte) {
		name, typ, hook := chainParts(body)
		if name == markerChain {
			skip[k] = true
		}
		if familyOf(k.family) == "" || typ != string(nftables.ChainTypeNAT) || hook != *nftables.ChainHookPrerouting {
			return
		}
		if all[k] == nil {
			all[k] = &outline{}
		}
		all[k].bases = append(all[k].bases, name)
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", err)
	}
	for k := range skip {
		delete(all, k)
	}
	return all, nil
}

// chainParts reads a chain; the type of one that is in no hook is empty.
func chainParts(body []byte) (name, typ string, hook nftables.ChainHook) {
	nfnl.Attributes(body, func(t uint16, b []byte) {
		switch t {
		case unix.NFTA_CHAIN_NAME:
			name = text(b)
		case unix.NFTA_CHAIN_TYPE:
			typ = text(b)
		case unix.NFTA_CHAIN_HOOK:
			nfnl.Attributes(b, func(t uint16, b []byte) {
				if t == unix.NFTA_HOOK_HOOKNUM && len(b) == 4 {
					hook = nftables.ChainHook(binary.BigEndian.Uint32(b))
				}
			})
		}
	})
	return name, typ, hook
}

// rulePrints are the prints of the rules of a table, each with the number of the last
// dump series that had it.
//
// They are a set, for while somebody changes any rule of the table, the kernel may put a
// rule into a dump twice, or leave one out: it goes on after each message by counting
// rules from the first, and counts those of transactions that are under way
// (__nf_tables_dump_rules).
type rulePrints map[uint64]uint32

// dumpsOfRules is how often the rules of a table are dumped, where the dumps are
// interrupted, until all were seen.
const dumpsOfRules = 4

// rules returns the prints of the rules of a table.
func (r *ForwardReader) rules(k tableKey) (rulePrints, error) {
	prints := rulePrints{}
	for n := range dumpsOfRules {
		known := len(prints)
		interrupted, err := r.eachRule(k, func(print uint64) { prints[print] = 0 })
		switch {
		case err != nil:
			return nil, err
		case !interrupted, n > 0 && len(prints) == known:
			return prints, nil
		}
	}
	return prints, nil
}

// sameRules reports whether a table has the rules whose prints are known, and no others.
// An interrupted dump may leave out known rules, so the dump is repeated until all of them
// were seen. It may also show a rule that one transaction adds and deletes again, so one
// interrupted dump with an unknown rule is ignored.
//
// An interrupted dump may also leave out a new rule. Then somebody's transaction ended
// meanwhile, which is a reason to read again.
func (r *ForwardReader) sameRules(k tableKey, known rulePrints) bool {
	r.series++
	seen, unknown := 0, 0
	for range dumpsOfRules {
		odd := false
		interrupted, err := r.eachRule(k, func(print uint64) {
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

// eachRule dumps the rules of a table once. It calls f with the print of each: a hash of
// all that does not count packets, its handle and place among it. It reports whether the
// dump was interrupted.
func (r *ForwardReader) eachRule(k tableKey, f func(print uint64)) (interrupted bool, err error) {
	var h maphash.Hash
	h.SetSeed(r.seed)
	err = r.dumpOnce(unix.NFT_MSG_GETRULE, byte(k.family), &k, func(_ tableKey, body []byte) {
		if !slices.ContainsFunc(counting, func(name []byte) bool { return bytes.Contains(body, name) }) {
			f(maphash.Bytes(r.seed, body))
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
		f(h.Sum64())
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

// foreign returns, by chain, the name of an expression that Linux does not have.
func (r *ForwardReader) foreign(k tableKey) (map[string]string, error) {
	found := map[string]string{}
	err := r.dump(unix.NFT_MSG_GETRULE, byte(k.family), &k, func(_ tableKey, body []byte) {
		var chain []byte
		nfnl.Attributes(body, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_RULE_CHAIN:
				chain = b
			case unix.NFTA_RULE_EXPRESSIONS:
				nfnl.Attributes(b, func(_ uint16, b []byte) {
					nfnl.Attributes(b, func(typ uint16, b []byte) {
						if typ == unix.NFTA_EXPR_NAME && !expressions[string(b)] {
							found[text(chain)] = text(b)
						}
					})
				})
			}
		})
	})
	return found, err
}

// expressions are those that Linux has. Of these the library leaves some out, which
// forward nothing.
var expressions = func() map[string]bool {
	all := map[string]bool{}
	for _, name := range []string{
		"bitwise", "byteorder", "cmp", "connlimit", "counter", "ct", "dup", "dynset", "exthdr", "fib", "flow_offload", "fwd",
		"hash", "immediate", "inner", "last", "limit", "log", "lookup", "masq", "match", "meta", "nat", "notrack", "numgen",
		"objref", "osf", "payload", "queue", "quota", "range", "redir", "reject", "rt", "socket", "synproxy", "target",
		"tproxy", "tunnel", "xfrm",
	} {
		all[name+"\x00"] = true
	}
	return all
}()

// unchanged reports whether the rules of a table, and the elements that they ask for,
// are those that were decoded.
func (r *ForwardReader) unchanged(k tableKey, t *readTable) bool {
	return r.sameRules(k, t.rules) && r.sameSets(k, t.sets)
}

func (r *ForwardReader) sameSets(k tableKey, sets map[string]uint64) bool {
	for name, print := range sets {
		if r.elements(k, name) != print {
			return false
		}
	}
	return true
}

// elements returns the print of the elements of a set, in whatever order; 0 is that
// of one that could not be read.
func (r *ForwardReader) elements(k tableKey, set string) (print uint64) {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, r.raw.NextSeq(1), byte(k.family))
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, k.name)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
	e.End()
	err := r.exchange(&e, func(body []byte) {
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
			})
		})
	})
	if uninterrupted(err) != nil {
		return 0
	}
	return max(print, 1)
}

// nftaSetElemExpressions is from linux/netfilter/nf_tables.h.
const nftaSetElemExpressions = 11

// dump is dumpOnce, and takes one that was interrupted for a good one. Whether somebody
// changed something meanwhile, Read sees by itself: most interruptions come from what we
// grant.
func (r *ForwardReader) dump(typ uint16, family byte, of *tableKey, f func(k tableKey, attrs []byte)) error {
	return uninterrupted(r.dumpOnce(typ, family, of, f))
}

func uninterrupted(err error) error {
	if errors.Is(err, nfnl.ErrInterrupted) {
		return nil
	}
	return err
}

// dumpOnce calls f with the attributes of each object of a kind: of one table, or of all.
func (r *ForwardReader) dumpOnce(typ uint16, family byte, of *tableKey, f func(k tableKey, attrs []byte)) error {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, r.raw.NextSeq(1), family)
	if of != nil {
		e.Str(unix.NFTA_RULE_TABLE, of.name)
	}
	e.End()
	return r.exchange(&e, func(body []byte) {
		attrs := body[nfnl.FamilyHeaderLen:]
		if of != nil {
			f(*of, attrs)
			return
		}
		k := tableKey{family: nftables.TableFamily(body[0])}
		nfnl.Attributes(attrs, func(typ uint16, b []byte) {
			if typ == unix.NFTA_TABLE_NAME { // and NFTA_CHAIN_TABLE
				k.name = text(b)
			}
		})
		f(k, attrs)
	})
}

// exchange asks for a dump. If the kernel refuses it, that comes before an interruption.
func (r *ForwardReader) exchange(e *nfnl.Encoder, f func(body []byte)) error {
	var refused error
	err := r.raw.Exchange(e, func(_ uint32, err error) { refused = err }, func(_ uint16, body []byte) {
		if len(body) >= nfnl.FamilyHeaderLen {
			f(body)
		}
	})
	if refused != nil {
		err = errors.Join(uninterrupted(err), refused)
	}
	return nfnl.Permitted(err)
}
