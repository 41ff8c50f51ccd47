package userrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A legacyFamily has the differences between iptables-legacy and ip6tables-legacy.
type legacyFamily struct {
	number  byte
	program string
	// names is the file that lists the tables. core is the module that makes the file, and
	// module, with the name of a table appended, the one that makes the table.
	names, core, module string
	// domain and level are those of the socket over which tables are read.
	domain, level int
	// In struct ipt_ip or ip6t_ip6: the size of an address, and the offsets of protocol,
	// flags and inverted flags.
	address, protocol, flags, inverted int
	// In struct ipt_entry or ip6t_entry: the offsets of target_offset and of the counters.
	target, counters int
}

var (
	legacy4 = &legacyFamily{
		number: unix.NFPROTO_IPV4, program: "iptables-legacy",
		names: "/proc/thread-self/net/ip_tables_names", core: "ip_tables", module: "iptable_",
		domain: unix.AF_INET, level: unix.SOL_IP,
		address: 4, protocol: 80, flags: 82, inverted: 83, target: 88, counters: 96,
	}
	legacy6 = &legacyFamily{
		number: unix.NFPROTO_IPV6, program: "ip6tables-legacy",
		names: "/proc/thread-self/net/ip6_tables_names", core: "ip6_tables", module: "ip6table_",
		domain: unix.AF_INET6, level: unix.SOL_IPV6,
		address: 16, protocol: 128, flags: 131, inverted: 132, target: 140, counters: aligned(148),
	}
)

// aligned returns the offset of a u64 behind n bytes of a structure. The kernel aligns it to
// 4 bytes for programs for 386, on 64-bit machines too (compat_u64), and else to 8 bytes.
func aligned(n int) int {
	if runtime.GOARCH == "386" {
		return n
	}
	return (n + 7) &^ 7
}

func legacyOf(family byte) *legacyFamily {
	if family == unix.NFPROTO_IPV4 {
		return legacy4
	}
	return legacy6
}

// Offsets in struct ipt_getinfo and ip6t_getinfo, which are the same.
const (
	legacyNameLen = 32 // XT_TABLE_MAXNAMELEN
	legacyHooks   = 5  // NF_INET_NUMHOOKS
	legacyValid   = legacyNameLen
	legacyEntries = legacyValid + 4
	legacyUnder   = legacyEntries + 4*legacyHooks
	legacyInfoLen = legacyUnder + 4*legacyHooks + 4 + 4
	legacySize    = legacyInfoLen - 4
)

var legacyHookNames = [legacyHooks]string{"PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"}

const (
	legacyCounters = 16 // struct xt_counters
	// xtHeader is the size of struct xt_entry_match and xt_entry_target: a size, a name
	// and a revision.
	xtHeader, xtName, xtRevision = 32, 2, 31
	standardTarget, errorTarget  = "", "ERROR"
)

// The flags of struct ipt_ip, and the inverted flags, which struct ip6t_ip6 has, too.
const (
	legacyFragment  = 1 << 0 // IPT_F_FRAG
	legacyHasProto6 = 1 << 0 // IP6T_F_PROTO
	legacyGoto4     = 1 << 1 // IPT_F_GOTO
	legacyGoto6     = 1 << 2 // IP6T_F_GOTO

	invertIn          = 1 << 0
	invertOut         = 1 << 1
	invertSource      = 1 << 3
	invertDestination = 1 << 4
	invertFragment    = 1 << 5
	invertProtocol    = 1 << 6
)

// size is the size of an entry of the family without matches and target.
func (f *legacyFamily) size() int { return f.counters + legacyCounters }

// A legacyEntry is a rule, the head of a chain, or the end of the table.
type legacyEntry struct {
	at, next   int    // offsets
	conditions []byte // struct ipt_ip or ip6t_ip6
	matches    []xtPart
	target     xtPart
}

// An xtPart is a match or a target.
type xtPart struct {
	name     string
	revision uint32
	info     []byte
}

// decodeLegacy decodes a table from the answers to IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES,
// the latter without its header. The result has the form
// of a table of iptables-nft, but its rules have numbers instead of handles. Its chains
// contain neither the policy rule of a base chain nor the final return of other chains, and
// no rule jumps to a chain that does not exist. What is not understood is an error, or a
// match or target of which only the name is known. The table keeps references into entries.
func decodeLegacy(f *legacyFamily, info, entries []byte) (*table, error) {
	if len(info) < legacyInfoLen {
		return nil, errors.New("description is too short")
	}
	t := f.table(nfnl.Text(info[:legacyNameLen]))
	all, err := f.entries(entries)
	if err != nil {
		return nil, err
	}
	starts, policies, err := t.legacyOutline(info, all)
	if err != nil {
		return nil, err
	}
	name, number := "", 0
	for i, e := range all {
		if start, ok := starts[e.at]; ok {
			if name != "" {
				return nil, fmt.Errorf("chain %s has no end", name)
			}
			name, number = start, 0
		}
		number++
		switch ends := i+1 == len(all) || all[i+1].target.name == errorTarget; {
		case e.target.name == errorTarget:
			if name != "" {
				return nil, fmt.Errorf("chain %s has no end", name)
			}
		case name == "":
			return nil, fmt.Errorf("entry at %d is in no chain", e.at)
		case policies[e.at] == name:
			if err := t.legacyPolicy(name, e); err != nil {
				return nil, err
			}
			name = ""
		case ends && e.isUnconditional() && e.target.isReturn():
			name = ""
		default:
			r, err := f.rule(e, starts)
			if err != nil {
				return nil, fmt.Errorf("rule %d of chain %s: %w", number, name, err)
			}
			r.chain, r.number, r.spec = name, number, f.spec(e)
			c := t.chains[name]
			c.rules, c.proxies = append(c.rules, r), c.proxies || r.proxies()
		}
	}
	return t, nil
}

// table returns a table without chains.
func (f *legacyFamily) table(name string) *table {
	return &table{title: f.program + " " + name, name: name, family: f.number, legacy: f, chains: map[string]*chain{}}
}

// legacyPriorities are the priorities of the base chains of iptables-legacy. Those of table
// nat are for prerouting and output, and negated for the other hooks.
var legacyPriorities = map[string]int32{"raw": -300, "mangle": -150, natTable: -100, filterTable: 0, "security": 50}

// legacyBase returns a base chain of a table.
func legacyBase(table, name string, hook uint32) base {
	b := base{name: name, kind: "filter", hook: hook, priority: legacyPriorities[table]}
	if table == natTable {
		b.kind = natKind
		if hook == unix.NF_INET_LOCAL_IN || hook == unix.NF_INET_POST_ROUTING {
			b.priority = -b.priority
		}
	}
	return b
}

// entries splits a table into its entries.
func (f *legacyFamily) entries(b []byte) (all []legacyEntry, err error) {
	for at := 0; at < len(b); {
		e, err := f.entry(b[at:])
		if err != nil {
			return nil, fmt.Errorf("entry at %d: %w", at, err)
		}
		e.at, e.next = at, at+e.next
		all = append(all, e)
		at = e.next
	}
	if len(all) == 0 || all[len(all)-1].target.name != errorTarget {
		return nil, errors.New("the end is missing")
	}
	return all, nil
}

// entry decodes the first entry of b.
func (f *legacyFamily) entry(b []byte) (e legacyEntry, err error) {
	size := f.size()
	if len(b) < size {
		return e, errors.New("too short")
	}
	target, next := int(binary.NativeEndian.Uint16(b[f.target:])), int(binary.NativeEndian.Uint16(b[f.target+2:]))
	if target < size || next < target || next > len(b) {
		return e, fmt.Errorf("target at %d and end at %d", target, next)
	}
	e.next, e.conditions = next, b[:f.inverted+1]
	for rest := b[size:target]; len(rest) > 0; {
		m, n, err := cutPart(rest)
		if err != nil {
			return e, fmt.Errorf("match: %w", err)
		}
		e.matches = append(e.matches, m)
		rest = rest[n:]
	}
	if e.target, _, err = cutPart(b[target:next]); err != nil {
		return e, fmt.Errorf("target: %w", err)
	}
	return e, nil
}

// cutPart decodes the first match or target of b, and returns its size.
func cutPart(b []byte) (p xtPart, n int, err error) {
	if len(b) < xtHeader {
		return p, 0, errors.New("too short")
	}
	if n = int(binary.NativeEndian.Uint16(b)); n < xtHeader || n > len(b) {
		return p, 0, fmt.Errorf("size %d", n)
	}
	name, _, _ := bytes.Cut(b[xtName:xtRevision], []byte{0})
	return xtPart{string(name), uint32(b[xtRevision]), b[xtHeader:n]}, n, nil
}

// legacyOutline makes the chains, still without rules. By offset of an entry, starts has
// the chain that begins there, and policies the chain whose policy is there.
func (t *table) legacyOutline(info []byte, all []legacyEntry) (starts, policies map[int]string, err error) {
	starts, policies = map[int]string{}, map[int]string{}
	begin := func(at int, name string) error {
		if _, twice := t.chains[name]; twice || starts[at] != "" || name == "" {
			return fmt.Errorf("chain %q at %d is there twice", name, at)
		}
		starts[at], t.chains[name] = name, &chain{}
		return nil
	}
	valid := binary.NativeEndian.Uint32(info[legacyValid:])
	for hook, name := range legacyHookNames {
		if valid&(1<<hook) == 0 {
			continue
		}
		if err := begin(int(binary.NativeEndian.Uint32(info[legacyEntries+4*hook:])), name); err != nil {
			return nil, nil, err
		}
		policies[int(binary.NativeEndian.Uint32(info[legacyUnder+4*hook:]))] = name
		t.bases = append(t.bases, legacyBase(t.name, name, uint32(hook)))
	}
	for _, e := range all[:len(all)-1] {
		if e.target.name == errorTarget {
			name, _, _ := bytes.Cut(e.target.info, []byte{0})
			if err := begin(e.next, string(name)); err != nil {
				return nil, nil, err
			}
		}
	}
	found := 0
	for _, e := range all {
		if starts[e.at] != "" {
			found++
		}
	}
	if found < len(starts) {
		return nil, nil, errors.New("a chain begins where no entry does")
	}
	return starts, policies, nil
}

// legacyPolicy reads the policy of a base chain.
func (t *table) legacyPolicy(chain string, e legacyEntry) error {
	v, err := e.target.verdict()
	if err != nil || !e.isUnconditional() || v != verdictAccept && v != verdictDrop {
		return fmt.Errorf("policy of chain %s is not understood", chain)
	}
	for i := range t.bases {
		if t.bases[i].name == chain {
			t.bases[i].drops = v == verdictDrop
		}
	}
	return nil
}

// isUnconditional follows unconditional in the kernel.
func (e legacyEntry) isUnconditional() bool {
	return len(e.matches) == 0 && allZero(e.conditions)
}

// The verdicts of a standard target. A verdict of 0 or more is the offset to continue at.
const (
	verdictDrop   = -1 // -NF_DROP - 1
	verdictAccept = -2
	verdictQueue  = -4
	verdictReturn = -5 // XT_RETURN
)

func (p xtPart) verdict() (int, error) {
	if p.name != standardTarget || len(p.info) < 4 {
		return 0, errors.New("no verdict")
	}
	return int(int32(binary.NativeEndian.Uint32(p.info))), nil
}

func (p xtPart) isReturn() bool {
	v, err := p.verdict()
	return err == nil && v == verdictReturn
}

// rule returns an entry as a rule of iptables-nft.
func (f *legacyFamily) rule(e legacyEntry, starts map[int]string) (r rule, err error) {
	for _, c := range f.conditions(e.conditions) {
		r.statements = append(r.statements, statement{expr: c})
	}
	for _, m := range e.matches {
		info, err := xt.Unmarshal(m.name, xt.TableFamily(f.number), m.revision, m.info)
		if err != nil {
			return r, fmt.Errorf("match %s: %w", m.name, err)
		}
		if c, ok := info.(*xt.Comment); ok {
			r.comment = string(*c)
		}
		r.statements = append(r.statements, statement{"match", &expr.Match{Name: m.name, Rev: m.revision, Info: info}})
	}
	if e.target.name != standardTarget {
		info, err := f.targetInfo(e.target)
		if err != nil {
			return r, fmt.Errorf("target %s: %w", e.target.name, err)
		}
		r.statements = append(r.statements, statement{"target", &expr.Target{Name: e.target.name, Rev: e.target.revision, Info: info}})
		return r, nil
	}
	v, err := e.target.verdict()
	if err != nil {
		return r, err
	}
	verdict := &expr.Verdict{}
	switch v {
	case e.next: // the rule has no target
		return r, nil
	case verdictAccept:
		verdict.Kind = expr.VerdictAccept
	case verdictDrop:
		verdict.Kind = expr.VerdictDrop
	case verdictQueue:
		verdict.Kind = expr.VerdictQueue
	case verdictReturn:
		verdict.Kind = expr.VerdictReturn
	default:
		if verdict.Chain = starts[v]; verdict.Chain == "" {
			return r, fmt.Errorf("verdict %d is not understood", v)
		}
		verdict.Kind = expr.VerdictJump
		if f.goes(e.conditions) {
			verdict.Kind = expr.VerdictGoto
		}
	}
	r.statements = append(r.statements, statement{"immediate", verdict})
	return r, nil
}

// targetInfo decodes the data of a target. A target that translates has a range. In its
// first revisions for IPv4 the number of ranges, 1, precedes it. The library takes every
// revision of SNAT for the first.
func (f *legacyFamily) targetInfo(p xtPart) (xt.InfoAny, error) {
	if f == legacy4 && slices.Contains([]string{"SNAT", "DNAT", "MASQUERADE", "REDIRECT"}, p.name) {
		if p.revision > 0 && p.name != "DNAT" {
			info := xt.Unknown(p.info)
			return &info, nil
		}
		if p.revision == 0 && (len(p.info) < 4 || binary.NativeEndian.Uint32(p.info) != 1) {
			return nil, errors.New("not one range")
		}
	}
	return xt.Unmarshal(p.name, xt.TableFamily(f.number), p.revision, p.info)
}

func (f *legacyFamily) goes(conditions []byte) bool {
	bit := byte(legacyGoto4)
	if f == legacy6 {
		bit = legacyGoto6
	}
	return conditions[f.flags]&bit != 0
}

// conditions returns the conditions of a rule on addresses, links, protocol and fragments,
// in the form of iptables-nft. It follows ip_packet_match and ip6_packet_match in the
// kernel.
func (f *legacyFamily) conditions(b []byte) (es []expr.Any) {
	inverted := func(bit byte) bool { return b[f.inverted]&bit != 0 }
	compare := func(load expr.Any, mask, data []byte, not bool) {
		es = append(es, load)
		if isOdd(mask) {
			es = append(es, &expr.Bitwise{
				SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: uint32(len(mask)), Mask: mask, Xor: make([]byte, len(mask)),
			})
		}
		op := expr.CmpOpEq
		if not {
			op = expr.CmpOpNeq
		}
		es = append(es, &expr.Cmp{Op: op, Register: unix.NFT_REG_1, Data: data})
	}
	header := func(offset, n int) expr.Any {
		return &expr.Payload{
			OperationType: expr.PayloadLoad, DestRegister: unix.NFT_REG_1,
			Base: expr.PayloadBaseNetworkHeader, Offset: uint32(offset), Len: uint32(n),
		}
	}

	source, names := 12, 4*f.address
	if f == legacy6 {
		source = 8
	}
	part := func(n int) []byte { return b[n*f.address : (n+1)*f.address] }
	for n, bit := range []byte{invertSource, invertDestination} {
		if mask := part(2 + n); !allZero(mask) || inverted(bit) {
			compare(header(source+n*f.address, f.address), mask, part(n), inverted(bit))
		}
	}
	link := func(n int) []byte { return b[names+n*unix.IFNAMSIZ:][:unix.IFNAMSIZ] }
	for n, bit := range []byte{invertIn, invertOut} {
		key := [...]expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME}[n]
		// The mask covers a name including its zero byte, or the first bytes of names.
		mask := bytes.TrimRight(link(2+n), "\x00")
		switch {
		case isOdd(mask):
			es = append(es, &expr.Match{Name: "link", Info: &xt.Unknown{}}) // iptables makes no such mask
		case len(mask) > 0 || inverted(bit):
			compare(&expr.Meta{Key: key, Register: unix.NFT_REG_1}, nil, link(n)[:len(mask)], inverted(bit))
		}
	}
	protocol := binary.NativeEndian.Uint16(b[f.protocol:])
	if protocol != 0 && (f == legacy4 || b[f.flags]&legacyHasProto6 != 0) {
		compare(&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1}, nil, []byte{byte(protocol)}, inverted(invertProtocol))
	}
	if f == legacy4 && b[f.flags]&legacyFragment != 0 {
		compare(header(6, 2), []byte{0x1f, 0xff}, []byte{0, 0}, !inverted(invertFragment))
	}
	return es
}

// isOdd reports whether a mask has clear bits.
func isOdd(mask []byte) bool {
	return slices.ContainsFunc(mask, func(b byte) bool { return b != 0xff })
}
