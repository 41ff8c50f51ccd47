package userrules

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
)

// A legacyReader reads the tables of iptables-legacy, and decodes only those that changed.
type legacyReader struct {
	read   func(*legacyFamily) (tables []rawLegacy, hidden []string, err error)
	polled []legacyDump // what LegacyChanged read and Read has not used yet
	print  uint64       // hash of the last complete reading; 0 if there is none
	last   []*table
	hidden []hiddenTable
}

// A legacyDump has the tables of one family.
type legacyDump struct {
	family *legacyFamily
	tables []rawLegacy
	hidden []string
	err    error
}

// legacyTables are the tables that may translate packets, drop forwarded packets, or give flows a
// conntrack helper.
var legacyTables = []string{natTable, "mangle", filterTable, "security", "raw"}

// LegacyChanged reports whether rules of iptables-legacy changed since the last reading.
// The first call returns true, unless Read was called before. The kernel does not report
// such changes, so LegacyChanged reads all rules that translate or filter; its cost grows
// with their number. The next Read uses this reading. Counters do not matter.
func (r *Reader) LegacyChanged() (bool, error) {
	l := &r.legacy
	dumps := l.dump()
	if err := failed(dumps); err != nil {
		return false, err
	}
	print := printOf(dumps)
	if print == l.print {
		return false, nil
	}
	l.polled, l.print = dumps, print
	return true, nil
}

func (l *legacyReader) dump() (dumps []legacyDump) {
	for _, f := range []*legacyFamily{legacy4, legacy6} {
		tables, hidden, err := l.read(f)
		for i := range tables {
			tables[i].sum = tables[i].print()
		}
		dumps = append(dumps, legacyDump{f, tables, hidden, err})
	}
	return dumps
}

// failed returns the errors of what could not be read.
func failed(dumps []legacyDump) error {
	var errs []error
	for _, d := range dumps {
		errs = append(errs, d.err)
		for _, t := range d.tables {
			errs = append(errs, t.err)
		}
	}
	return errors.Join(errs...)
}

// printOf returns a hash of all tables. It is never 0.
func printOf(dumps []legacyDump) uint64 {
	var h maphash.Hash
	h.SetSeed(legacySeed)
	for _, d := range dumps {
		for _, t := range d.tables {
			_, _ = h.Write(binary.NativeEndian.AppendUint64(nil, t.sum))
		}
		_, _ = h.WriteString(fmt.Sprint(d.family.program, d.hidden))
	}
	return max(h.Sum64(), 1)
}

// tables returns the tables that exist, those that may exist, and whether both are the same
// as the last time. A table that cannot be read is included, with nothing known of it.
func (l *legacyReader) tables() (all []*table, hidden []hiddenTable, same bool) {
	dumps := l.polled
	if l.polled = nil; dumps == nil {
		dumps, l.print = l.dump(), 0
		if failed(dumps) == nil {
			l.print = printOf(dumps)
		}
	}
	for _, d := range dumps {
		if d.err != nil {
			for _, name := range legacyTables {
				all = append(all, l.table(rawLegacy{family: d.family, name: name, err: d.err}))
			}
		}
		for _, raw := range d.tables {
			all = append(all, l.table(raw))
		}
		for _, name := range d.hidden {
			hidden = append(hidden, hiddenTable{d.family, name})
		}
	}
	same = slices.Equal(all, l.last) && slices.Equal(hidden, l.hidden)
	l.last, l.hidden = all, hidden
	return all, hidden, same
}

// table decodes a table, or returns that of the last time if it did not change.
func (l *legacyReader) table(raw rawLegacy) *table {
	var old *table
	if i := slices.IndexFunc(l.last, func(t *table) bool { return t.legacy == raw.family && t.name == raw.name }); i >= 0 {
		old = l.last[i]
	}
	if old != nil && raw.err == nil && old.print == raw.sum {
		return old
	}
	t := raw.decode()
	t.follow(old)
	return t
}

var legacySeed = maphash.MakeSeed()

// print is a hash of the rules and the name of the table, without the packet counters. It
// is never 0.
func (t rawLegacy) print() uint64 {
	var h maphash.Hash
	h.SetSeed(legacySeed)
	_, _ = h.Write(t.info)
	rest := t.entries
	for f := t.family; len(rest) >= f.size(); {
		next := int(binary.NativeEndian.Uint16(rest[f.target+2:]))
		if next < f.size() || next > len(rest) {
			break // neither this entry nor its counters are understood
		}
		_, _ = h.Write(rest[:f.counters])
		_, _ = h.Write(rest[f.size():next])
		rest = rest[next:]
	}
	_, _ = h.Write(rest)
	return max(h.Sum64(), 1)
}
