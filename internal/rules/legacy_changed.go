//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"fmt"
	"hash/maphash"
)

// LegacyChanged reports whether rules of iptables-legacy changed since the last call; the
// first one returns true. The kernel tells of no such change, so this reads all rules that
// translate or filter: what it costs grows with their number. Counters do not matter.
func (t *Tables) LegacyChanged() (bool, error) {
	var h maphash.Hash
	h.SetSeed(legacySeed)
	for _, f := range []*legacyFamily{legacy4, legacy6} {
		tables, hidden, err := readLegacy(t.netns, f, natTable, "mangle", filterTable, "security")
		if err != nil {
			return false, err
		}
		for _, raw := range tables {
			_, _ = h.Write(binary.NativeEndian.AppendUint64(nil, raw.print()))
		}
		_, _ = h.WriteString(fmt.Sprint(f.program, hidden))
	}
	print := max(h.Sum64(), 1)
	changed := print != t.legacy
	t.legacy = print
	return changed, nil
}

var legacySeed = maphash.MakeSeed()

// print is a hash of the rules and the name of the table, without what counts packets; it
// is never 0.
func (t rawLegacy) print() uint64 {
	var h maphash.Hash
	h.SetSeed(legacySeed)
	_, _ = h.Write(t.info)
	rest := t.entries
	for f := t.family; len(rest) >= f.size(); {
		next := int(binary.NativeEndian.Uint16(rest[f.target+2:]))
		if next < f.size() || next > len(rest) {
			break // it is not understood, and so are its counters
		}
		_, _ = h.Write(rest[:f.counters])
		_, _ = h.Write(rest[f.size():next])
		rest = rest[next:]
	}
	_, _ = h.Write(rest)
	return max(h.Sum64(), 1)
}
