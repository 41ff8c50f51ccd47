//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A baseChain is a chain of a hook.
type baseChain struct {
	table    tableReader
	title    string // of the table, with its family
	name     string
	family   nftables.TableFamily
	priority int32
	drops    bool // its policy
}

// Children reads what the chains of the forward hook of the network namespace
// behind the descriptor netns, 0 for the current, do with the first packet of a
// flow from the links outside, nil for any, to a host of each of the subnets. The
// answers have the order of the subnets. The chains of our own tables are not read.
// Where iptables-legacy may have a filter table that only root may know of, the answer
// is Unknown, but for what others drop.
//
// An error names the table and chain that could not be read; there is no answer
// then. Where there is no nftables the error is an *UnsupportedError.
func Children(netns int, outside []Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return nil, nfnl.Permitted(err)
	}
	defer func() { _ = c.Close() }()
	inside, err := insideLinks(netns, outside, subnets)
	if err != nil {
		return nil, err
	}
	legacy, hidden, err := legacyForwardHook(netns, subnets)
	if err != nil {
		return nil, err
	}
	answers, err := readTwice(func() ([]ChildVerdicts, bool, error) {
		r := &hookReader{c: c}
		chains, err := r.baseChains(nftables.ChainHookForward, "")
		if err != nil {
			return nil, r.moved, err
		}
		chains = append(chains, legacy...)
		slices.SortStableFunc(chains, func(a, b baseChain) int { return cmp.Compare(a.priority, b.priority) })
		answers, err := childVerdicts(chains, outside, inside, subnets)
		return answers, r.moved, err
	})
	if err != nil {
		return nil, err
	}
	for i := range answers {
		if hidden(subnets[i]) {
			answers[i].mayDropAll()
		}
	}
	return answers, nil
}

// mayDropAll makes unknown what was accepted.
func (v *ChildVerdicts) mayDropAll() {
	for _, a := range []*Answer{&v.DNATed, &v.Related, &v.MostDNATed, &v.MostRelated} {
		if *a == Accepted {
			*a = Unknown
		}
	}
}

// maxReads is how often something is read that changes all the time.
const maxReads = 5

// readTwice reads until the ruleset was the same all the time, or two answers in a
// row are the same: a grant of our own changes it, too, and one that was made of two
// rulesets does not come out twice.
func readTwice(read func() (answers []ChildVerdicts, moved bool, err error)) ([]ChildVerdicts, error) {
	var before []ChildVerdicts
	for range maxReads {
		answers, moved, err := read()
		switch {
		case !moved:
			return answers, err
		case err != nil:
			before = nil
		case before != nil && slices.Equal(answers, before):
			return answers, nil
		default:
			before = answers
		}
	}
	return nil, fmt.Errorf("read the chains of the forward hook: %w", nfnl.ErrInterrupted)
}

// baseChains lists the base chains of the user's that packets meet in a hook; those of one
// kind, or of all if that is empty.
func (r *hookReader) baseChains(hook *nftables.ChainHook, kind nftables.ChainType) ([]baseChain, error) {
	type key struct {
		family byte
		name   string
	}
	skipped := map[key]bool{} // dormant ones and ours
	err := r.ask(unix.NFT_MSG_GETTABLE, unix.NLM_F_DUMP, nftables.TableFamilyUnspecified, nil, func(family byte, b []byte) {
		k := key{family: family}
		flags := uint32(0)
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_TABLE_NAME:
				k.name = text(b)
			case unix.NFTA_TABLE_FLAGS:
				flags = number32(b)
			}
		})
		skipped[k] = flags&uint32(nftables.TableFlagDormant) != 0
	})
	if err := listError("tables", nfnl.Permitted(err)); err != nil {
		return nil, err
	}
	var bases []baseChain
	tables := map[key]*hookTable{}
	err = r.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, nftables.TableFamilyUnspecified, nil, func(family byte, b []byte) {
		base := baseChain{family: nftables.TableFamily(family)}
		k := key{family: family}
		meets, ofKind := false, kind == ""
		nfnl.Attributes(b, func(typ uint16, b []byte) {
			switch typ {
			case unix.NFTA_CHAIN_TABLE:
				k.name = text(b)
			case unix.NFTA_CHAIN_NAME:
				base.name = text(b)
			case unix.NFTA_CHAIN_POLICY:
				base.drops = number32(b) == uint32(nftables.ChainPolicyDrop)
			case unix.NFTA_CHAIN_TYPE:
				ofKind = ofKind || text(b) == string(kind)
			case unix.NFTA_CHAIN_HOOK:
				nfnl.Attributes(b, func(typ uint16, b []byte) {
					switch typ {
					case unix.NFTA_HOOK_HOOKNUM:
						meets = number32(b) == uint32(*hook)
					case unix.NFTA_HOOK_PRIORITY:
						base.priority = int32(number32(b))
					}
				})
			}
		})
		skipped[k] = skipped[k] || base.name == markerChain
		if !meets || !ofKind || familyOf(base.family) == "" {
			return
		}
		if tables[k] == nil {
			tables[k] = newHookTable(r, base.family, k.name)
		}
		base.title, base.table = fmt.Sprint(familyOf(base.family), " ", k.name), tables[k]
		bases = append(bases, base)
	})
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", nfnl.Permitted(err))
	}
	bases = slices.DeleteFunc(bases, func(b baseChain) bool {
		t := b.table.(*hookTable)
		return skipped[key{byte(t.family), t.name}]
	})
	return bases, nil
}

// childVerdicts answers for each of the subnets. The links inside lead to them, where
// they are known.
func childVerdicts(chains []baseChain, outside []Link, inside []*Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	from := []*Link{nil}
	if len(outside) > 0 {
		from = nil
	}
	for i := range outside {
		from = append(from, &outside[i])
	}
	answers := make([]ChildVerdicts, len(subnets))
	for i, subnet := range subnets {
		for n, in := range from {
			v, err := verdicts(chains, func(related bool) *child {
				return newChild(related, in, inside[i], outside, subnet, subnets)
			})
			if err != nil {
				return nil, err
			}
			if a := &answers[i]; n == 0 {
				*a = v
			} else {
				a.DNATed, a.Related = both(a.DNATed, v.DNATed), both(a.Related, v.Related)
				a.MostDNATed, a.MostRelated = both(a.MostDNATed, v.MostDNATed), both(a.MostRelated, v.MostRelated)
			}
		}
		if a := &answers[i]; a.MostDNATed != Dropped && a.MostRelated != Dropped {
			a.Dropper = ""
		}
	}
	return answers, nil
}

// verdicts answers for the packets of both kinds that packets returns.
func verdicts(chains []baseChain, packets func(related bool) *child) (v ChildVerdicts, err error) {
	for _, kind := range []struct {
		related   bool
		all, most *Answer
	}{{true, &v.Related, &v.MostRelated}, {false, &v.DNATed, &v.MostDNATed}} {
		var dropper string
		if *kind.all, dropper, err = hookAnswer(chains, packets(kind.related), false); err != nil {
			return v, err
		}
		if *kind.most = *kind.all; *kind.all == Unknown {
			if *kind.most, dropper, err = hookAnswer(chains, packets(kind.related), true); err != nil {
				return v, err
			}
		}
		if *kind.most == Dropped {
			v.Dropper = dropper
		}
	}
	return v, nil
}

func both(a, b Answer) Answer {
	if a != b {
		return Unknown
	}
	return a
}

// hookAnswer takes packets through all chains. An accept ends one chain only.
func hookAnswer(chains []baseChain, packets *child, most bool) (Answer, string, error) {
	answer := Accepted
	for _, c := range chains {
		if c.family != nftables.TableFamilyINet && byte(c.family) != packets.family {
			continue
		}
		w := hookWalk{table: c.table, child: packets, most: most, known: map[string]fates{}}
		f, err := w.chain(c.name)
		if err != nil {
			return Unknown, "", fmt.Errorf("read nftables table %s: %w", c.title, nfnl.Permitted(err))
		}
		if f&returns != 0 {
			if f &^= returns; c.drops {
				f |= drops
			} else {
				f |= accepts
			}
		}
		switch f {
		case accepts:
		case drops:
			return Dropped, c.title + " " + c.name, nil
		default:
			answer = Unknown
		}
	}
	return answer, "", nil
}
