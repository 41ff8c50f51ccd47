package rules

import (
	"fmt"
	"hash/fnv"
	"math"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// MarkerChain is an empty chain in each of our tables. It shows that conenatd made the
// table.
const MarkerChain = "made_by_conenatd"

// Names of counters. They are named objects, so that they keep their values when rules
// change. Tags in internal/control/wire.go have these names.
const (
	guardCounter    = "guard_drops"
	childCounter    = "child_drops"
	spoofedCounter  = "spoofed_drops"   // from outside with an inside source, and from elsewhere with a peer's
	unsureCounter   = "unsure"          // flows that came by a link that is not the way back; nothing is learned from them
	zeroCounter     = "port_zero_drops" // packets that match an anchor, and ICMP errors about one
	admittedCounter = "admitted"
	expectedCounter = "expected"
	learnedCounter  = "learned"       // packets from which the kernel learned a permission
	limitedCounter  = "learn_limited" // those from which it did not, because of the rate
	zonedCounter    = "arrived_in_zone"
	unzonedCounter  = "expected_in_zone_0" // packets in a zone that only an expectation could admit
)

// Names of sets.
const (
	outsideSet       = "outside"
	bridgesSet       = "bridges"
	zonedSet         = "zoned_addresses"
	admittedSet      = "admitted_flows"
	learnedSet       = "learned_flows"
	learnersSet      = "learners"
	repeatersSet     = "repeaters"
	bucketsSet       = "buckets"  // and the cap on children
	childrenSet      = "children" // and the cap
	subnetsSet       = "subnets"
	noPeersSet       = "no_peers"
	groupsSet        = "groups" // and the length of their prefixes
	openSet          = "open_subnets"
	excludedPeerSet  = "excluded_peer_ports"
	excludedPortsSet = "excluded_ports"
)

// Priorities. A verdict "accept" ends only our own chain, not those of others.
const (
	// After the user's filter rules, so that their rejects and counters keep working, and
	// after IPVS, which takes packets that have no local socket.
	guardPriority = 200
	// Before the user's filter rules: flows over the cap cost them nothing.
	childPriority = -10
	// Before conntrack.
	rawPriority = -300
	// After every chain of the user's: all NAT chains run inside one hook of the
	// kernel, and their priority only orders them. So the user's own forwards win.
	admitPriority = math.MaxInt32 - 1
	// Before every chain of the user's, for the same reason: it keeps the source of
	// admitted flows. nft allows no NAT chain at a lower priority.
	sourcePriority = -199
	// After the user's marks (mangle) and before NAT, at a priority for which nft has no
	// name: these names differ between nft versions.
	wayBackPriority = -111
	// After srcnat, when the outside endpoint is known, and after the user's own chains,
	// which may drop the packet there.
	learnPriority = 290
)

const (
	// learnerTimeout is how long the rate of an inside address, or of an unanswered flow,
	// is remembered.
	learnerTimeout = time.Minute
	// savedTimeout is the timeout of elements that a saved copy of our rules makes: nft
	// 1.0.2 does not print the timeouts that rules give to elements of maps. Our own
	// elements always have their own.
	savedTimeout = 10 * time.Minute
	// admittedTimeout is how long the first packet of a child may take through the gateway.
	// admittedSize limits how many such packets may be under way.
	admittedTimeout = time.Second
	admittedSize    = 1 << 18
	// learnedSize limits how many learned flows the kernel remembers. When a flow beyond
	// that limit ends, only the daemon passes its outside port on to another host.
	learnedSize = 1 << 17
	// childrenSize is for how many pairs of a peer and an outside endpoint children through
	// expectations are counted, in each family. There may be 75,000 expectations, each
	// for up to 16 peers.
	childrenSize = 1 << 20
)

// A layout is the contents of one of our tables.
type layout struct {
	table    *nftables.Table
	counters []string
	chains   []*nftables.Chain
	sets     []*set
	rules    []*nftables.Rule
	links    []string // the outside links, sorted
	noPeers  *set     // addresses that are never peers
	inZone0  exprs    // matches flows whose outside endpoint is in the default conntrack zone
	zoned    *set     // outside addresses whose flows have a zone in the original direction alone
}

// A set either has exactly the elements that we want, or it is free: its elements come and
// go.
type set struct {
	*nftables.Set
	elements []nftables.SetElement
	free     bool
	first    []nftables.SetElement // what a free set begins with
}

// newLayouts returns the contents of the tables that d asks for. There is only one table
// without a map, mappings and IPv4 sources that may be spoofed.
func newLayouts(name string, d Desired) ([]*layout, error) {
	inet := newLayout(name, nftables.TableFamilyINet, d.OutsideLinks)
	// nft has no types for a zone and for a number of host bits: both are encoded as ports.
	revoked := inet.set(elements.RevokedSet, nftables.TypeIP6Addr, nftables.TypeIP6Addr,
		nftables.TypeInetService, nftables.TypeInetService, nftables.TypeInetService)
	revoked.HasTimeout, revoked.free, revoked.Size = true, true, elements.DeniedSize
	served := familiesOf(d.Subnets)
	if d.Guard {
		inet.guard(served)
	}
	if len(d.Helpers) > 0 {
		inet.portZero(d)
	}
	if d.Spoofed && !d.noFib { // after portZero: these rules end the chain for some packets
		inet.spoofed(d)
	}
	inet.children(d, served)
	if d.unsure6Wanted() {
		inet.unsure6(d)
	}
	if d.UplinkMarks != nil {
		inet.uplinkMarks(d.UplinkMarks, d.Subnets)
	}
	inet.inZone(d)
	if d.Helped && len(d.Helpers) > 0 {
		inet.helped(d)
	}
	ls := []*layout{inet}
	sources := d.unsureSources()
	if d.Map != nil || d.Mapping != nil || len(sources) > 0 || d.Quiet {
		ip := newLayout(name, nftables.TableFamilyIPv4, d.outside4())
		switch {
		case len(d.ZonedAddrs) == 0:
			ip.inZone0 = zoneIs0
		case d.Map != nil || d.Mapping != nil:
			ip.zoned = ip.set(zonedSet, nftables.TypeIPAddr)
			for _, a := range slices.SortedFunc(slices.Values(d.ZonedAddrs), netip.Addr.Compare) {
				ip.zoned.elements = append(ip.zoned.elements, nftables.SetElement{Key: a.AsSlice()})
			}
		}
		if d.Map != nil {
			ip.permissions(d.Map)
		}
		switch {
		case len(sources) > 0:
			ip.unsure(d, sources)
		case d.hidesTCP(): // the kernel cannot tell the way back
			ip.wayBack(d)
		}
		if d.Map != nil {
			kinds := ip.kinds(d.Map)
			ip.admit(d, kinds)
			ip.keepSource(d.Map)
			ip.learn(d, kinds)
		}
		if d.Mapping != nil {
			ip.mapping(d)
		}
		if d.Quiet && !d.learns() {
			ip.quiet(d)
		}
		ls = append(ls, ip)
	}
	for _, l := range ls {
		slices.Sort(l.counters)
		l.counters = slices.Compact(l.counters)
		if err := l.sign(); err != nil {
			return nil, err
		}
	}
	return ls, nil
}

func newLayout(name string, family nftables.TableFamily, outside []string) *layout {
	l := &layout{table: &nftables.Table{Name: name, Family: family}}
	l.chains = append(l.chains, &nftables.Chain{Table: l.table, Name: MarkerChain})
	l.links = slices.Compact(slices.Sorted(slices.Values(outside)))
	if len(l.links) == 1 {
		return l
	}
	l.linkSet(outsideSet, l.links)
	return l
}

// linkSet makes a set of the names of links.
func (l *layout) linkSet(name string, links []string) *set {
	if s := l.named(name); s != nil { // another rule has it
		return s
	}
	s := l.set(name, nftables.TypeIFName)
	s.KeyByteOrder = binaryutil.NativeEndian // otherwise nft lists the names wrong
	for _, link := range slices.Compact(slices.Sorted(slices.Values(links))) {
		s.elements = append(s.elements, nftables.SetElement{Key: nfnl.LinkKey(link)})
	}
	return s
}

// outside tests whether the name of a link is that of an outside link. A single name is
// compared directly, which is cheaper than a set lookup.
func (l *layout) outside(name operand, is bool) exprs {
	switch {
	case len(l.links) != 1:
		return name.lookup(l.named(outsideSet), !is)
	case is:
		return name.is(nfnl.LinkKey(l.links[0]))
	}
	return name.isNot(nfnl.LinkKey(l.links[0]))
}

// by tests whether a packet came by one of the links. A set of that name has them if they are several.
func (l *layout) by(links []string, name string) exprs {
	if len(links) == 1 {
		return iifname.is(nfnl.LinkKey(links[0]))
	}
	return iifname.in(l.linkSet(name, links))
}

// named returns the set with that name, or nil.
func (l *layout) named(name string) *set {
	for _, s := range l.sets {
		if s.Name == name {
			return s
		}
	}
	return nil
}

func (l *layout) set(name string, key ...nftables.SetDatatype) *set {
	s := &set{Set: &nftables.Set{Table: l.table, Name: name, KeyType: key[0]}}
	if len(key) > 1 {
		s.KeyType = nftables.MustConcatSetType(key...)
	}
	l.sets = append(l.sets, s)
	return s
}

// regular adds a chain without a hook, for goto and jump.
func (l *layout) regular(name string) *nftables.Chain {
	c := &nftables.Chain{Table: l.table, Name: name}
	l.chains = append(l.chains, c)
	return c
}

func (l *layout) filter(name string, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	return l.chain(name, nftables.ChainTypeFilter, hook, priority)
}

func (l *layout) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, priority nftables.ChainPriority) *nftables.Chain {
	policy := nftables.ChainPolicyAccept
	c := &nftables.Chain{
		Table: l.table, Name: name, Type: typ, Hooknum: hook, Priority: &priority, Policy: &policy,
	}
	l.chains = append(l.chains, c)
	return c
}

func (l *layout) rule(c *nftables.Chain, comment string, parts ...exprs) {
	r := &nftables.Rule{Table: c.Table, Chain: c, Exprs: join(parts...)}
	if comment != "" {
		r.UserData = userdata.AppendString(nil, userdata.TypeComment, comment)
	}
	l.rules = append(l.rules, r)
}

// signature is the type of an attribute in a rule's user data. nft ignores it.
const signature userdata.Type = 0xc0

// sign puts a hash of each rule beside its comment. The library cannot read all expressions
// back, so the kernel's rules are compared by these hashes.
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
