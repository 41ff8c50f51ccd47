//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

const (
	unsureSet = "unsure"
	// unsureTimeout is longer than any time between two reconciles, at which the
	// daemon renews the flows that live on. unsureSize bounds how many there are.
	unsureTimeout = 2 * time.Hour
	unsureSize    = 1 << 18
)

// flowKey is an original direction: source and destination.
var flowKey = []nftables.SetDatatype{
	nftables.TypeIPAddr, nftables.TypeInetService, nftables.TypeIPAddr, nftables.TypeInetService,
}

const flowKeyLen = 16

// unsure remembers flows that begin with a source of a subnet, by a link that is not the
// way back to it: the source may be spoofed, so nothing is learned from them. They pass;
// a gateway may have good reasons for such packets. The daemon hears of them by the set
// alone: their event says nothing of links, so there is none.
//
// A NAT chain sees the first packet only, with the marks that the user's chains gave it.
func (l *layout) unsure(d Desired, subnets []netip.Prefix) {
	l.counters = append(l.counters, unsureCounter)
	inside := l.set(subnetsSet, nftables.TypeIPAddr)
	inside.Interval, inside.elements = true, intervals(subnets)
	flows := l.set(unsureSet, flowKey...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = unsureTimeout, unsureSize

	found, from := &nftables.Chain{Table: l.table, Name: "no_way_back"}, &nftables.Chain{Table: l.table, Name: "from_inside"}
	l.chains = append(l.chains, found, from)
	c := l.chain("way_back", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, sourcePriority)
	test := noWayBack
	if !d.noIPsec {
		test = join(noSecurityPath, noWayBack)
	}
	l.rule(c, "", join(isUDP, packetSource, in(inside), goTo(from)))
	for _, upper := range slices.Sorted(maps.Keys(d.Uppers)) {
		l.rule(from, "the way back is the link below", join(
			iifname, is(linkKey(upper)), wayBack, is(linkKey(d.Uppers[upper])), accept))
	}
	l.rule(from, "the way back is not the link that it came by", join(test, forwarded, goTo(found)))
	l.rule(from, "an earlier flow may have been spoofed", join(isUDP, packetFlow, remember(opDelete)))
	l.rule(found, "nothing is learned from it", join(isUDP, packetFlow,
		remember(unix.NFT_DYNSET_OP_ADD), withoutNewEvent, count(unsureCounter), accept))
	l.rule(found, "too many to remember", drop(unsureCounter))
}

// remember adds the flow in reg to the set, or does with it what else op says.
func remember(op uint32) piece {
	return piece{&expr.Dynset{SrcRegKey: reg, SetName: unsureSet, Operation: op}}
}

const opDelete = 2 // NFT_DYNSET_OP_DELETE

// withoutNewEvent leaves the event of the flow's end alone.
var withoutNewEvent = piece{
	&expr.Immediate{Register: reg, Data: ne32(1 << 2)}, // IPCT_DESTROY
	&expr.Ct{Key: expr.CtKeyEVENTMASK, Register: reg, SourceRegister: true},
}

// isUnsure matches the flows that unsure remembers, and renews them.
var isUnsure = join(isUDP, originalFlow, piece{&expr.Lookup{SourceRegister: reg, SetName: unsureSet}}, originalFlow,
	remember(unix.NFT_DYNSET_OP_UPDATE))

// A Direction is the source and the destination of a flow as it began.
type Direction struct{ Src, Dst cone.Endpoint }

// Unsure calls f for every flow whose source may be spoofed. It has a connection of its
// own.
func (t *Tables) Unsure(f func(Direction)) error {
	return dump(t.netns, t.name, unsureSet, func(key, _ []byte, _ time.Duration) {
		if len(key) == flowKeyLen {
			f(Direction{Src: endpoint(key), Dst: endpoint(key[8:])})
		}
	})
}

// RenewUnsure renews flows that Unsure told of.
func (t *Tables) RenewUnsure(flows []Direction) {
	_ = t.tellUnsure(flows, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // some may have ended
}

// AddUnsure adds flows that Unsure told of, of other tables. They are forgotten where
// these tables have no such set.
func (t *Tables) AddUnsure(flows []Direction) error {
	if err := t.tellUnsure(flows, unix.NFT_MSG_NEWSETELEM); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// tellUnsure sends messages about each of the flows, and returns the first error.
func (t *Tables) tellUnsure(flows []Direction, messages ...uint16) (first error) {
	var b batcher
	b.begin(t.w)
	for part := range slices.Chunk(flows, batch) {
		clear(b.errs[:])
		transact(&b, part, uint32(len(messages)), func(seq uint32, d *Direction) {
			for i, typ := range messages {
				b.flow(t.name, seq+uint32(i), typ, d)
			}
		})
		for _, err := range b.errs[:len(part)] {
			if err != nil && first == nil {
				first = fmt.Errorf("add element to set %s: %w", unsureSet, nfnl.Permitted(err))
			}
		}
	}
	return first
}

// flow appends a message about a flow in the set.
func (b *batcher) flow(table string, seq uint32, typ uint16, d *Direction) {
	flags := uint16(unix.NLM_F_REQUEST)
	if typ == unix.NFT_MSG_NEWSETELEM {
		flags |= unix.NLM_F_CREATE
	}
	e := &b.enc
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, flags, seq, unix.AF_INET)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, table)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, unsureSet)
	list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	element := e.Nest(unix.NFTA_LIST_ELEM)
	key := e.Nest(unix.NFTA_SET_ELEM_KEY)
	e.Attr(unix.NFTA_DATA_VALUE, flowKeyLen)
	for _, x := range []cone.Endpoint{d.Src, d.Dst} {
		e.B = append(e.B, x.Addr[12:]...)
		e.B = append(e.B, be16(x.Port)...)
		e.Pad()
	}
	e.EndNest(key)
	e.EndNest(element)
	e.EndNest(list)
	e.End()
}
