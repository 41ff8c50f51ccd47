package userrules

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables/expr"
)

// recorded returns what the kernel said of a table, without its counters: see
// testdata/legacy/README.
func recorded(t testing.TB, name string) (info, entries []byte) {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the tables were recorded on a little-endian machine")
	}
	dir := "testdata/legacy/"
	if runtime.GOARCH == "386" {
		dir += "386/"
	}
	b, err := os.ReadFile(dir + name)
	if err != nil {
		t.Fatal(err)
	}
	return b[:legacyInfoLen], b[legacyInfoLen:]
}

// lines lists the rules of a table.
func (t *table) lines() (all []string) {
	for _, b := range t.bases {
		all = append(all, fmt.Sprintf("%s: hook %d, drops %v", b.name, b.hook, b.drops))
	}
	for name, c := range t.chains {
		for _, r := range c.rules {
			s := fmt.Sprintf("%s %d:", name, r.number)
			for _, e := range r.statements {
				s += " " + line(e.expr)
			}
			all = append(all, strings.TrimSuffix(strings.ReplaceAll(s, "  ", " "), ";"))
		}
	}
	slices.Sort(all)
	return all
}

func line(e expr.Any) string {
	switch e := e.(type) {
	case *expr.Payload:
		return fmt.Sprintf("header %d+%d", e.Offset, e.Len)
	case *expr.Meta:
		return fmt.Sprintf("meta %d", e.Key)
	case *expr.Bitwise:
		return fmt.Sprintf(" & %x", e.Mask)
	case *expr.Cmp:
		return fmt.Sprintf(" %s %x;", map[expr.CmpOp]string{expr.CmpOpEq: "==", expr.CmpOpNeq: "!="}[e.Op], e.Data)
	case *expr.Match:
		return fmt.Sprintf("match %s.%d %T;", e.Name, e.Rev, e.Info)
	case *expr.Target:
		return fmt.Sprintf("target %s.%d %T", e.Name, e.Rev, e.Info)
	case *expr.Verdict:
		return strings.TrimSpace(map[expr.VerdictKind]string{
			expr.VerdictAccept: "accept", expr.VerdictDrop: "drop", expr.VerdictReturn: "return",
			expr.VerdictJump: "jump ", expr.VerdictGoto: "goto ",
		}[e.Kind] + e.Chain)
	}
	return fmt.Sprintf("%T", e)
}

func TestLegacyTablesAreDecoded(t *testing.T) {
	for name, want := range map[string][]string{
		"iptable_nat": {
			"INPUT: hook 1, drops false",
			"OUTPUT: hook 3, drops false",
			"POSTROUTING 1: meta 16 == 11; target MASQUERADE.0 *xt.NatIPv4MultiRangeCompat",
			"POSTROUTING 2: meta 16 == 11; target SNAT.0 *xt.NatIPv4MultiRangeCompat",
			"POSTROUTING 3: target SNAT.0 *xt.NatIPv4MultiRangeCompat",
			"POSTROUTING: hook 4, drops false",
			"PREROUTING 1: meta 16 == 11; match udp.0 *xt.Udp; target DNAT.2 *xt.NatRange2",
			"PREROUTING 2: header 12+4 & ffffff00 == cb007100; meta 6 == 77616e3000; meta 16 == 11; match multiport.1 *xt.Unknown; " +
				"target REDIRECT.0 *xt.NatIPv4MultiRangeCompat",
			"PREROUTING 3: meta 6 != 6c616e; goto fw",
			"PREROUTING: hook 0, drops false",
			"fw 1: header 16+4 == c6336401; return",
			"fw 2: meta 16 == 11; match comment.0 *xt.Comment; target DNAT.2 *xt.NatRange2",
		},
		"iptable_filter": {
			"FORWARD 1: match conntrack.3 *xt.ConntrackMtinfo3; accept",
			"FORWARD 2: header 6+2 & 1fff != 0000",
			"FORWARD: hook 2, drops true",
			"INPUT: hook 1, drops false",
			"OUTPUT: hook 3, drops false",
		},
		"ip6table_nat": {
			"INPUT: hook 1, drops false",
			"OUTPUT: hook 3, drops false",
			"POSTROUTING: hook 4, drops false",
			"PREROUTING 1: header 24+16 & ffffffffffffffff0000000000000000 == 20010db8000000000000000000000000; meta 16 == 11; " +
				"match udp.0 *xt.Udp; target DNAT.2 *xt.NatRange2",
			"PREROUTING 2: meta 16 == 11; match udp.0 *xt.Udp; target REDIRECT.0 *xt.NatRange",
			"PREROUTING: hook 0, drops false",
		},
	} {
		t.Run(name, func(t *testing.T) {
			info, entries := recorded(t, name)
			f := legacy4
			if strings.HasPrefix(name, "ip6") {
				f = legacy6
			}
			got, err := decodeLegacy(f, info, entries)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got.lines()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// A table that the kernel would not make is an error, never a table without the odd part.
func TestLegacyTablesThatAreNotUnderstood(t *testing.T) {
	const entry = 112 // struct ipt_entry
	number := binary.NativeEndian.PutUint32
	for name, change := range map[string]func(info, entries []byte){
		"hook in the middle of an entry": func(info, _ []byte) { number(info[legacyEntries:], 8) },
		"no policy":                      func(info, _ []byte) { number(info[legacyUnder:], 8) },
		"two hooks with one chain":       func(info, _ []byte) { number(info[legacyEntries+4:], 0) },
		"short match":                    func(_, b []byte) { b[entry], b[entry+1] = 31, 0 },
		"long match":                     func(_, b []byte) { b[entry], b[entry+1] = 0xff, 0xff },
		"target before the matches":      func(_, b []byte) { b[legacy4.target] = 8 },
		"entry without end":              func(_, b []byte) { b[legacy4.target+2], b[legacy4.target+3] = 0xff, 0xff },
		"match of another size": func(_, b []byte) {
			copy(b[entry+xtName:], "conntrack\x00")
			b[entry+xtRevision] = 3
		},
		"unknown verdict": func(info, b []byte) {
			at := binary.NativeEndian.Uint32(info[legacyUnder:])
			number(b[at+entry+xtHeader:], 1<<31)
		},
		"jump into the middle of a chain": func(_, b []byte) {
			all, _ := legacy4.entries(b)
			number(all[2].target.info, uint32(all[1].at))
		},
		"more than one range": func(_, b []byte) {
			at := bytes.Index(b, []byte("MASQUERADE\x00"))
			number(b[at-xtName+xtHeader:], 1<<31)
		},
		"end is missing": func(_, b []byte) {
			copy(b[len(b)-xtHeader-32+xtName:], "OTHER")
		},
		"chain of a hook": func(_, b []byte) {
			copy(b[bytes.Index(b, []byte("ERROR\x00"))-xtName+xtHeader:], "INPUT\x00")
		},
		"chain without end": func(_, b []byte) {
			all, _ := legacy4.entries(b)
			accept := int32(verdictAccept)
			number(all[len(all)-2].target.info, uint32(accept)) // where a return was
		},
	} {
		t.Run(name, func(t *testing.T) {
			info, entries := recorded(t, "iptable_nat")
			if _, err := decodeLegacy(legacy4, info, entries); err != nil {
				t.Fatal(err)
			}
			change(info, entries)
			if got, err := decodeLegacy(legacy4, info, entries); err == nil {
				t.Error(got.lines())
			}
		})
	}
}

func FuzzDecodeLegacy(f *testing.F) {
	for _, name := range []string{"iptable_nat", "iptable_filter", "ip6table_nat"} {
		info, entries := recorded(f, name)
		f.Add(strings.HasPrefix(name, "ip6"), info, entries)
	}
	f.Fuzz(decodes)
}

// decodes checks that any bytes decode to an error or to a table that can be used.
func decodes(t *testing.T, v6 bool, info, entries []byte) {
	family := legacy4
	if v6 {
		family = legacy6
	}
	table, err := decodeLegacy(family, info, entries)
	if err != nil {
		return
	}
	for _, c := range table.chains {
		for _, r := range c.rules {
			for _, e := range r.statements {
				if v, ok := e.expr.(*expr.Verdict); ok && v.Chain != "" {
					if _, there := table.chains[v.Chain]; !there {
						t.Errorf("no chain %q", v.Chain)
					}
				}
			}
		}
	}
}

func TestGarbageIsNoLegacyTable(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, name := range []string{"iptable_nat", "iptable_filter", "ip6table_nat"} {
		info, entries := recorded(t, name)
		for range 5000 {
			i, b := bytes.Clone(info), bytes.Clone(entries)
			for range 1 + r.IntN(4) {
				if r.IntN(8) == 0 {
					i[r.IntN(len(i))] = byte(r.Uint32())
				} else {
					b[r.IntN(len(b))] = byte(r.Uint32()) >> r.IntN(8)
				}
			}
			decodes(t, strings.HasPrefix(name, "ip6"), i, b[:len(b)-r.IntN(2)*r.IntN(len(b))])
		}
	}
}
