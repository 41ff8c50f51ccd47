package rules

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Text returns the tables with that name which do what d wants, as a file that nft loads.
// It assumes a kernel with every Feature, and asks none.
func Text(name string, d Desired) (string, error) {
	ls, err := newLayouts(name, d)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	for _, l := range ls {
		b.WriteString(l.String())
	}
	return b.String(), nil
}

// String returns the table in the syntax of nft, as "nft --stateless list table" shows it,
// except for two things: it omits the flags owner and persist, which only a running program
// can set, and it keeps protocol tests that nft omits where the rest of the rule implies
// them.
func (l *layout) String() string {
	var parts []string
	for _, name := range l.counters {
		parts = append(parts, fmt.Sprintf("\tcounter %s {\n\t}\n", name))
	}
	for _, s := range l.sets {
		parts = append(parts, s.String())
	}
	for _, c := range l.chains {
		parts = append(parts, l.chainText(c))
	}
	return fmt.Sprintf("table %s {\n%s}\n", title(l.table), strings.Join(parts, "\n"))
}

func (l *layout) chainText(c *nftables.Chain) string {
	var b strings.Builder
	fmt.Fprintf(&b, "\tchain %s {\n", c.Name)
	if c.Hooknum != nil {
		fmt.Fprintf(&b, "\t\ttype %s hook %s priority %s; policy accept;\n", c.Type, hookNames[*c.Hooknum], priorityText(*c.Priority))
	}
	for _, r := range l.rules {
		if r.Chain == c {
			fmt.Fprintf(&b, "\t\t%s\n", l.ruleText(r))
		}
	}
	b.WriteString("\t}\n")
	return b.String()
}

var hookNames = map[nftables.ChainHook]string{
	*nftables.ChainHookPrerouting: "prerouting", *nftables.ChainHookInput: "input",
	*nftables.ChainHookForward: "forward", *nftables.ChainHookPostrouting: "postrouting",
}

// priorityText names a priority as nft does: relative to a standard priority close by.
func priorityText(p nftables.ChainPriority) string {
	for name, base := range map[string]nftables.ChainPriority{"raw": rawPriority, "filter": 0} {
		switch near := p - base; {
		case near == 0:
			return name
		case near > 0 && near <= 10:
			return fmt.Sprintf("%s + %d", name, near)
		case near < 0 && near >= -10:
			return fmt.Sprintf("%s - %d", name, -near)
		}
	}
	return fmt.Sprint(p)
}

// String returns the set in the syntax of nft, with the elements that this package writes.
func (s *set) String() string {
	var b strings.Builder
	kind, of := "set", s.KeyType.Name
	if s.IsMap {
		kind, of = "map", of+" : "+s.DataType.Name
	}
	fmt.Fprintf(&b, "\t%s %s {\n\t\ttype %s\n", kind, s.Name, of)
	if size := sizeOf(s.Set); size > 0 {
		fmt.Fprintf(&b, "\t\tsize %d\n", size)
	}
	var flags []string
	implied := s.Timeout > 0 && !s.Dynamic && !s.Interval // nft prints no flag that follows from the timeout
	for _, f := range []struct {
		name string
		on   bool
	}{{"dynamic", s.Dynamic}, {"interval", s.Interval}, {"timeout", s.HasTimeout && !implied}} {
		if f.on {
			flags = append(flags, f.name)
		}
	}
	if len(flags) > 0 {
		fmt.Fprintf(&b, "\t\tflags %s\n", strings.Join(flags, ","))
	}
	if s.Timeout > 0 {
		fmt.Fprintf(&b, "\t\ttimeout %s\n", timeText(s.Timeout))
	}
	if len(s.elements) > 0 {
		fmt.Fprintf(&b, "\t\telements = { %s }\n", strings.Join(s.elementTexts(), ", "))
	}
	b.WriteString("\t}\n")
	return b.String()
}

func (s *set) elementTexts() (all []string) {
	text := constants[s.KeyType.Name]
	for i, e := range s.elements {
		switch {
		case e.IntervalEnd:
		case !s.Interval:
			all = append(all, text(e.Key))
		default:
			last := slices.Repeat([]byte{0xff}, len(e.Key))
			if i+1 < len(s.elements) && s.elements[i+1].IntervalEnd {
				last = oneBefore(s.elements[i+1].Key)
			}
			all = append(all, rangeText(text, e.Key, last))
		}
	}
	return all
}

// oneBefore returns the key before b. b must not be all zeros.
func oneBefore(b []byte) []byte {
	b = bytes.Clone(b)
	for i := len(b) - 1; i >= 0; i-- {
		if b[i]--; b[i] != 0xff {
			break
		}
	}
	return b
}

// rangeText names the range from first to last. A range of addresses is named by a prefix
// if one covers exactly that range.
func rangeText(text func([]byte) string, first, last []byte) string {
	from, ok := netip.AddrFromSlice(first)
	for bits := 0; ok && bits < 8*len(first); bits++ {
		if p := netip.PrefixFrom(from, bits); p.Masked() == p && cone.RangeOf(p).Last.Compare(netipAddr(last)) == 0 {
			return p.String()
		}
	}
	if slices.Equal(first, last) {
		return text(first)
	}
	return text(first) + "-" + text(last)
}

func netipAddr(b []byte) netip.Addr {
	a, _ := netip.AddrFromSlice(b)
	return a
}

// timeText is a duration as nft writes it: 1h30s.
func timeText(d time.Duration) string {
	var b strings.Builder
	for _, unit := range []struct {
		name string
		is   time.Duration
	}{{"d", 24 * time.Hour}, {"h", time.Hour}, {"m", time.Minute}, {"s", time.Second}, {"ms", time.Millisecond}} {
		if n := d / unit.is; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, unit.name)
			d -= n * unit.is
		}
	}
	return b.String()
}

// constants format values of nft's types.
var constants = map[string]func([]byte) string{
	"ipv4_addr":    addrText,
	"ipv6_addr":    addrText,
	"inet_service": func(b []byte) string { return fmt.Sprint(binary.BigEndian.Uint16(b)) },
	"ifname":       quoted,
	"string":       quoted, // a conntrack helper
	"inet_proto": func(b []byte) string {
		return named(uint32(b[0]), map[uint32]string{unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_ICMPV6: "ipv6-icmp"})
	},
	"nf_proto": func(b []byte) string {
		return named(uint32(b[0]), map[uint32]string{unix.NFPROTO_IPV4: "ipv4", unix.NFPROTO_IPV6: "ipv6"})
	},
	"ct_state":  func(b []byte) string { return bitNames(binary.NativeEndian.Uint32(b), ctStates) },
	"ct_status": func(b []byte) string { return bitNames(binary.NativeEndian.Uint32(b), ctStatuses) },
	"ct_event":  func(b []byte) string { return bitNames(binary.NativeEndian.Uint32(b), ctEvents) },
	"ct_label": func(b []byte) string {
		for i := 0; i < 8*len(b); i++ {
			if binary.NativeEndian.Uint32(b[i/32*4:])>>(i%32)&1 == 1 {
				return fmt.Sprint(i)
			}
		}
		return "0"
	},
	"zone": func(b []byte) string { return fmt.Sprint(binary.NativeEndian.Uint16(b)) },
	"mark": func(b []byte) string { return fmt.Sprintf("0x%08x", binary.NativeEndian.Uint32(b)) },
	"fib_type": func(b []byte) string {
		return named(binary.NativeEndian.Uint32(b), map[uint32]string{unix.RTN_LOCAL: "local"})
	},
	"boolean":   func(b []byte) string { return map[bool]string{false: "missing", true: "exists"}[b[0] != 0] },
	"integer_8": func(b []byte) string { return fmt.Sprint(b[0]) },
	"integer":   func(b []byte) string { return "0x" + strings.TrimLeft(fmt.Sprintf("%x", b), "0") },
	"number":    func(b []byte) string { return fmt.Sprint(binary.NativeEndian.Uint32(b)) },
}

func addrText(b []byte) string { return netipAddr(b).String() }

func quoted(b []byte) string { return `"` + strings.TrimRight(string(b), "\x00") + `"` }

func named(n uint32, names map[uint32]string) string {
	if name, ok := names[n]; ok {
		return name
	}
	return fmt.Sprint(n)
}

// bitNames are the names of the set bits of n, from the lowest on.
func bitNames(n uint32, names []string) string {
	var set []string
	for i := range 32 {
		switch {
		case n>>i&1 == 0:
		case i < len(names):
			set = append(set, names[i])
		default:
			set = append(set, fmt.Sprintf("0x%x", uint32(1)<<i))
		}
	}
	return strings.Join(set, ",")
}

var (
	ctStates   = []string{"invalid", "established", "related", "new"}
	ctStatuses = []string{"expected", "seen-reply", "assured", "confirmed", "snat", "dnat", "seq-adjust", "snat-done", "dnat-done", "dying"}
	ctEvents   = []string{"new", "related", "destroy", "reply", "assured"}
)
