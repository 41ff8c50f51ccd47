//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"hash/fnv"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// markerChain is empty and only says whose the table is.
const markerChain = "made_by_conenatd"

// Names of counters. They are objects of their own, so that they go on when
// rules change.
const (
	guardCounter = "guard_drops"
	childCounter = "child_drops"
	zeroCounter  = "port_zero_drops"
)

var counters = []string{guardCounter, childCounter, zeroCounter}

const outsideSet = "outside"

// Priorities. A verdict "accept" ends a chain of ours, no other one.
const (
	// After the user's filter rules, so that their rejects and counters stay,
	// and after IPVS, which takes packets to no local socket.
	guardPriority = 200
	// Before the user's filter rules: what is over the cap costs them nothing.
	childPriority = -10
	// Before conntrack.
	zeroPriority = -300
)

// A layout is the contents of the table.
type layout struct {
	outside []string
	chains  []*nftables.Chain
	sets    []*nftables.Set
	rules   []*nftables.Rule
}

// newLayout returns the contents that do what d wants.
func newLayout(t *nftables.Table, d Desired) (*layout, error) {
	l := &layout{outside: slices.Compact(slices.Sorted(slices.Values(d.OutsideLinks)))}
	l.chains = append(l.chains, &nftables.Chain{Table: t, Name: markerChain})
	l.sets = append(l.sets, &nftables.Set{
		Table: t, Name: outsideSet, KeyType: nftables.TypeIFName,
		KeyByteOrder: binaryutil.NativeEndian, // else nft lists the names wrong
	})

	zero := l.chain(t, "port_zero", nftables.ChainHookPrerouting, zeroPriority)
	l.rule(zero, "no packet may match an anchor", join(isUDP, sourcePort, is(be16(0)), drop(zeroCounter)))
	l.rule(zero, "no packet may match an anchor", join(isUDP, destinationPort, is(be16(0)), drop(zeroCounter)))

	if d.Guard {
		guard := l.chain(t, "guard", nftables.ChainHookInput, guardPriority)
		l.rule(guard, "conntrack knows it", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
		l.rule(guard, "", join(notUDP, accept))
		l.rule(guard, "", join(notOutside, accept))
		// The expression ends the rule where there is no socket.
		l.rule(guard, "a socket waits for it", join(socket, atMost(1), accept))
		l.rule(guard, "it would keep the peer from the inside host", drop(guardCounter))
	}
	if d.MaxChildren > 0 {
		children := l.chain(t, "children", nftables.ChainHookForward, childPriority)
		// The first packet of a child has the one bit and not yet the other.
		l.rule(children, "not the first packet of an expected flow",
			join(ctStatus, masked(ctExpected|ctConfirmed), isNot(ne32(ctExpected)), accept))
		l.rule(children, "", join(notUDP, accept))
		l.rule(children, "", join(notOutside, accept))
		for _, f := range families {
			// The limit is part of the name, as each element keeps the limit
			// that it was made with.
			set := &nftables.Set{
				Table: t, Name: fmt.Sprintf("children%s_%d", f.name, d.MaxChildren), Dynamic: true,
				KeyType: nftables.MustConcatSetType(f.addr, f.addr, nftables.TypeInetService),
			}
			l.sets = append(l.sets, set)
			l.rule(children, "flows of one peer to one outside endpoint", join(
				nfproto, is([]byte{f.proto}), f.key,
				add(set, &expr.Connlimit{Count: uint32(d.MaxChildren), Flags: expr.NFT_CONNLIMIT_F_INV}),
				drop(childCounter)))
		}
	}
	return l, l.sign()
}

func (l *layout) chain(t *nftables.Table, name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	policy := nftables.ChainPolicyAccept
	c := &nftables.Chain{
		Table: t, Name: name, Type: nftables.ChainTypeFilter,
		Hooknum: hook, Priority: &priority, Policy: &policy,
	}
	l.chains = append(l.chains, c)
	return c
}

func (l *layout) rule(c *nftables.Chain, comment string, exprs []expr.Any) {
	r := &nftables.Rule{Table: c.Table, Chain: c, Exprs: exprs}
	if comment != "" {
		r.UserData = userdata.AppendString(nil, userdata.TypeComment, comment)
	}
	l.rules = append(l.rules, r)
}

// signature is the type of an attribute of a rule's user data. nft skips it.
const signature userdata.Type = 0xc0

// sign puts a hash of each rule beside its comment. The library cannot read all
// expressions back, so what stands is compared by that.
func (l *layout) sign() error {
	for _, r := range l.rules {
		h := fnv.New64a()
		for _, e := range r.Exprs {
			b, err := expr.Marshal(byte(r.Table.Family), e)
			if err != nil {
				return fmt.Errorf("encode rule: %w", err)
			}
			h.Write(b)
		}
		r.UserData = userdata.Append(r.UserData, signature, h.Sum(nil))
	}
	return nil
}

// elements are the names of links as elements of a set.
func elements(links []string) []nftables.SetElement {
	var es []nftables.SetElement
	for _, name := range links {
		es = append(es, nftables.SetElement{Key: linkKey(name)})
	}
	return es
}

func linkKey(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key[:unix.IFNAMSIZ-1], name)
	return key
}
