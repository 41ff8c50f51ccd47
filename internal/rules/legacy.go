//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// A legacyTable is a table of iptables-legacy in the form in which nftables has those of
// iptables-nft, so that whoever reads the latter reads the former, too. A rule has no
// handle; its Position is its number in its chain, from 1 on.
type legacyTable struct {
	family *legacyFamily
	name   string
	bases  []legacyBase
	// chains are the rules of all chains by name, without the policy of a base chain and
	// the return at the end of any other one. No rule jumps to a chain that is not here.
	chains map[string][]*nftables.Rule
}

// title names the table for users.
func (t *legacyTable) title() string { return t.family.program + " " + t.name }

// A legacyBase is a chain that packets get to by a hook.
type legacyBase struct {
	name  string
	hook  nftables.ChainHook
	drops bool // its policy
}

// A legacyFamily is what differs between iptables-legacy and ip6tables-legacy.
type legacyFamily struct {
	nftables.TableFamily
	program string
	// names is the file that lists the tables; modules are those that make it, and, with
	// the name of a table behind it, the one that makes the table.
	names, core, module string
	// domain and level are those of the socket that reads tables.
	domain, level int
	// Of struct ipt_ip or ip6t_ip6: the size of an address, and where protocol, flags and
	// inverted flags are.
	address, protocol, flags, inverted int
	// Of struct ipt_entry or ip6t_entry: where target_offset and the counters are.
	target, counters int
}

var (
	legacy4 = &legacyFamily{
		TableFamily: nftables.TableFamilyIPv4, program: "iptables-legacy",
		names: "/proc/thread-self/net/ip_tables_names", core: "ip_tables", module: "iptable_",
		domain: unix.AF_INET, level: unix.SOL_IP,
		address: 4, protocol: 80, flags: 82, inverted: 83, target: 88, counters: 96,
	}
	legacy6 = &legacyFamily{
		TableFamily: nftables.TableFamilyIPv6, program: "ip6tables-legacy",
		names: "/proc/thread-self/net/ip6_tables_names", core: "ip6_tables", module: "ip6table_",
		domain: unix.AF_INET6, level: unix.SOL_IPV6,
		address: 16, protocol: 128, flags: 131, inverted: 132, target: 140, counters: 152,
	}
)

// Of struct ipt_getinfo and ip6t_getinfo, which are the same.
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

// The bits of flags of struct ipt_ip, and those of the inverted flags, which
// struct ip6t_ip6 has, too.
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

// size is that of an entry of the family without matches and target, on 64-bit machines.
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

// decodeLegacy decodes what IPT_SO_GET_INFO and IPT_SO_GET_ENTRIES say of a table, the
// latter without its header, as a 64-bit machine has it. What it does not understand is
// an error, or a match or target that is known by name only; it keeps parts of entries.
func decodeLegacy(f *legacyFamily, info, entries []byte) (*legacyTable, error) {
	if len(info) < legacyInfoLen {
		return nil, errors.New("description is too short")
	}
	t := &legacyTable{family: f, name: text(info[:legacyNameLen]), chains: map[string][]*nftables.Rule{}}
	all, err := f.entries(entries)
	if err != nil {
		return nil, err
	}
	starts, policies, err := t.outline(info, all)
	if err != nil {
		return nil, err
	}
	chain, number := "", 0
	for i, e := range all {
		if name, ok := starts[e.at]; ok {
			if chain != "" {
				return nil, fmt.Errorf("chain %s has no end", chain)
			}
			chain, number = name, 0
		}
		number++
		switch ends := i+1 == len(all) || all[i+1].target.name == errorTarget; {
		case e.target.name == errorTarget:
			if chain != "" {
				return nil, fmt.Errorf("chain %s has no end", chain)
			}
		case chain == "":
			return nil, fmt.Errorf("entry at %d is in no chain", e.at)
		case policies[e.at] == chain:
			if err := t.policy(chain, e); err != nil {
				return nil, err
			}
			chain = ""
		case ends && e.isUnconditional() && e.target.isReturn():
			chain = ""
		default:
			r, err := t.rule(e, starts)
			if err != nil {
				return nil, fmt.Errorf("rule %d of chain %s: %w", number, chain, err)
			}
			r.Chain, r.Position = &nftables.Chain{Name: chain}, uint64(number)
			t.chains[chain] = append(t.chains[chain], r)
		}
	}
	return t, nil
}

// entries cuts a table into its entries.
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

// entry cuts off the first entry of b.
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

// cutPart cuts off the first match or target of b, and returns its size.
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

// outline makes the chains, still without rules. It returns the chain that begins with an
// entry, and the one whose policy an entry is.
func (t *legacyTable) outline(info []byte, all []legacyEntry) (starts, policies map[int]string, err error) {
	starts, policies = map[int]string{}, map[int]string{}
	begin := func(at int, name string) error {
		if _, twice := t.chains[name]; twice || starts[at] != "" || name == "" {
			return fmt.Errorf("chain %q at %d is there twice", name, at)
		}
		starts[at], t.chains[name] = name, nil
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
		t.bases = append(t.bases, legacyBase{name: name, hook: nftables.ChainHook(hook)})
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

// policy reads the policy of a base chain.
func (t *legacyTable) policy(chain string, e legacyEntry) error {
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

// isUnconditional follows unconditional of the kernel.
func (e legacyEntry) isUnconditional() bool {
	return len(e.matches) == 0 && !slices.ContainsFunc(e.conditions, func(b byte) bool { return b != 0 })
}

// The verdicts of a standard target; one that is not negative is where to go on.
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

// rule returns an entry as iptables-nft would have it.
func (t *legacyTable) rule(e legacyEntry, starts map[int]string) (*nftables.Rule, error) {
	es := t.family.conditions(e.conditions)
	for _, m := range e.matches {
		info, err := xt.Unmarshal(m.name, xt.TableFamily(t.family.TableFamily), m.revision, m.info)
		if err != nil {
			return nil, fmt.Errorf("match %s: %w", m.name, err)
		}
		es = append(es, &expr.Match{Name: m.name, Rev: m.revision, Info: info})
	}
	if e.target.name != standardTarget {
		info, err := t.family.targetInfo(e.target)
		if err != nil {
			return nil, fmt.Errorf("target %s: %w", e.target.name, err)
		}
		return &nftables.Rule{Exprs: append(es, &expr.Target{Name: e.target.name, Rev: e.target.revision, Info: info})}, nil
	}
	v, err := e.target.verdict()
	if err != nil {
		return nil, err
	}
	verdict := &expr.Verdict{}
	switch v {
	case e.next: // no target
		return &nftables.Rule{Exprs: es}, nil
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
			return nil, fmt.Errorf("verdict %d is not understood", v)
		}
		verdict.Kind = expr.VerdictJump
		if t.family.goes(e.conditions) {
			verdict.Kind = expr.VerdictGoto
		}
	}
	return &nftables.Rule{Exprs: append(es, verdict)}, nil
}

// targetInfo decodes the data of a target. That of one that translates has a range, and
// before it their number, 1, in the first revisions for IPv4; the library takes each
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
	return xt.Unmarshal(p.name, xt.TableFamily(f.TableFamily), p.revision, p.info)
}

func (f *legacyFamily) goes(conditions []byte) bool {
	bit := byte(legacyGoto4)
	if f == legacy6 {
		bit = legacyGoto6
	}
	return conditions[f.flags]&bit != 0
}

// conditions returns what a rule asks of addresses, links, protocol and fragments as
// iptables-nft has it. It follows ip_packet_match and ip6_packet_match of the kernel.
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
	asks := func(mask []byte) bool { return slices.ContainsFunc(mask, func(b byte) bool { return b != 0 }) }

	source, names := 12, 4*f.address
	if f == legacy6 {
		source = 8
	}
	part := func(n int) []byte { return b[n*f.address : (n+1)*f.address] }
	for n, bit := range []byte{invertSource, invertDestination} {
		if mask := part(2 + n); asks(mask) || inverted(bit) {
			compare(header(source+n*f.address, f.address), mask, part(n), inverted(bit))
		}
	}
	link := func(n int) []byte { return b[names+n*unix.IFNAMSIZ:][:unix.IFNAMSIZ] }
	for n, bit := range []byte{invertIn, invertOut} {
		key := [...]expr.MetaKey{expr.MetaKeyIIFNAME, expr.MetaKeyOIFNAME}[n]
		// The mask covers a name with the zero behind it, or the beginning of names.
		mask := bytes.TrimRight(link(2+n), "\x00")
		switch {
		case isOdd(mask):
			es = append(es, &expr.Match{Name: "link", Info: &xt.Unknown{}}) // nothing that iptables makes
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

// isOdd reports whether a mask leaves out bits.
func isOdd(mask []byte) bool {
	return slices.ContainsFunc(mask, func(b byte) bool { return b != 0xff })
}
