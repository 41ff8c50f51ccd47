//go:build !(386 || arm || mips || mipsle)

package rules

import "github.com/google/nftables"

// A readLegacyTable is what was read of a nat table of iptables-legacy.
type readLegacyTable struct {
	print uint64 // of its rules; 0 where there is no such table, or it could not be read
	alone []Forward
	found []Forward // the same, and what may have been missed
}

// Hidden reports whether, when the forwards were last read, there may have been some of
// iptables-legacy that are not among them: another user than root may not know which
// tables there are.
func (r *ForwardReader) Hidden() bool { return r.hidden }

// readLegacy reads the forwards of iptables-legacy. It reports whether they are the same
// as the last time. A table that cannot be read is no error, but a Forward that is
// Unknown.
func (r *ForwardReader) readLegacy() (found []Forward, same bool) {
	same, r.hidden = true, false
	for _, f := range []*legacyFamily{legacy4, legacy6} {
		t := r.legacy[f]
		if t == nil {
			t = &readLegacyTable{}
			r.legacy[f] = t
		}
		raw, hidden, err := readLegacy(r.netns, f, natTable)
		r.hidden = r.hidden || len(hidden) > 0
		switch {
		case err == nil && len(raw) == 0:
			same = same && t.found == nil
			*t = readLegacyTable{}
		case err == nil && raw[0].print() == t.print:
		default:
			same, t.print = false, 0
			t.take(f, r.outside, raw, err)
			if err == nil {
				t.print = raw[0].print()
			}
		}
		found = append(found, t.found...)
	}
	return found, same
}

// take puts what a table forwards in the place of what was before. Where it was not
// understood, that stays, and failed says why it could not be read.
func (t *readLegacyTable) take(f *legacyFamily, outside []Link, raw []rawLegacy, failed error) {
	w := &walker{
		table: &nftables.Table{Name: natTable, Family: f.TableFamily}, title: f.program + " " + natTable,
		outside: outside, seen: map[string]bool{},
	}
	in := condition{family: byte(f.TableFamily)}
	var table *legacyTable
	if failed == nil {
		table, failed = raw[0].decode()
	}
	if failed != nil {
		in.unknown = true
		w.add(in.forward(failed.Error()))
		for _, before := range t.alone {
			w.add(before)
		}
		t.found = w.found
		return
	}
	w.rules = table.chains
	for _, b := range table.bases {
		if b.hook == *nftables.ChainHookPrerouting {
			w.chain(b.name, in, 0)
		}
	}
	t.alone, t.found = w.found, w.found
}
