//go:build !(386 || arm || mips || mipsle)

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

// MarkerChain is a chain of each of our tables. It is empty and only says whose the table
// is.
const MarkerChain = "made_by_conenatd"

// Names of counters. They are objects of their own, so that they go on when
// rules change.
const (
	guardCounter    = "guard_drops"
	childCounter    = "child_drops"
	spoofedCounter  = "spoofed_drops"
	unsureCounter   = "unsure"
	zeroCounter     = "port_zero_drops"
	admittedCounter = "admitted"
	expectedCounter = "expected"
	learnedCounter  = "learned"
	limitedCounter  = "learn_limited"
	zonedCounter    = "arrived_in_zone"
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
	bucketsSet       = "buckets" // and the cap on children
	subnetsSet       = "subnets"
	noPeersSet       = "no_peers"
	groupsSet        = "groups" // and the length of their prefixes
	openSet          = "open_subnets"
	excludedPeerSet  = "excluded_peer_ports"
	excludedPortsSet = "excluded_ports"
)

// Priorities. A verdict "accept" ends a chain of ours, no other one.
const (
	// After the user's filter rules, so that their rejects and counters stay,
	// and after IPVS, which takes packets to no local socket.
	guardPriority = 200
	// Before the user's filter rules: what is over the cap costs them nothing.
	childPriority = -10
	// Before conntrack.
	rawPriority = -300
	// After every chain of the user's: all NAT chains run inside one hook of the
	// kernel, and their priority only orders them. So the user's own forwards win.
	admitPriority = math.MaxInt32 - 1
	// Before every chain of the user's, for the same reason: it keeps the source of
	// what was admitted. nft allows no NAT chain below.
	sourcePriority = -199
	// After the user's marks (mangle) and before NAT, where nft has no name for a priority:
	// its versions have different ones.
	wayBackPriority = -111
	// After srcnat, when the outside endpoint is known, and after what the
	// user's own chains may drop there.
	learnPriority = 290
)

const (
	// learnerTimeout is how long the rate of an inside address, or of a flow that
	// goes on unanswered, is remembered.
	learnerTimeout = time.Minute
	// savedTimeout ends what a saved copy of our rules makes: nft 1.0.2 does not print
	// the timeouts that rules give to elements of maps. Ours always have their own.
	savedTimeout = 10 * time.Minute
	// admittedTimeout is how long the first packet of a child may take through the
	// gateway, and admittedSize bounds how many are on their way.
	admittedTimeout = time.Second
	admittedSize    = 1 << 18
	// learnedSize bounds the flows that the kernel remembers to have learned from. When one
	// beyond them ends, its port passes on by the daemon alone.
	learnedSize = 1 << 17
)

// A layout is the contents of one of our tables.
type layout struct {
	table    *nftables.Table
	counters []string
	chains   []*nftables.Chain
	sets     []*set
	rules    []*nftables.Rule
	links    []string // the outside ones, sorted
	noPeers  *set     // addresses that are never peers
	inZone0  exprs    // matches flows whose outside endpoint is of the default conntrack zone
	zoned    *set     // outside addresses, where zones are of the original direction alone
}

// A set is one with the elements that we want, or one whose elements come and
// go.
type set struct {
	*nftables.Set
	elements []nftables.SetElement
	free     bool
}

// newLayouts returns the contents of both tables that do what d wants; without a map, mappings
// and IPv4 sources that may be spoofed there is but one.
func newLayouts(name string, d Desired) ([]*layout, error) {
	inet := newLayout(name, nftables.TableFamilyINet, d.OutsideLinks)
	// nft has no type for a zone and for a number of bits: these are two more ports.
	revoked := inet.set(elements.RevokedSet, nftables.TypeIP6Addr, nftables.TypeIP6Addr,
		nftables.TypeInetService, nftables.TypeInetService, nftables.TypeInetService)
	revoked.HasTimeout, revoked.free, revoked.Size = true, true, elements.DeniedSize
	served := familiesOf(d.Subnets)
	if d.Guard {
		inet.guard(served)
	}
	if d.Spoofed && !d.noFib {
		inet.spoofed(d)
	}
	if len(d.Helpers) > 0 {
		inet.portZero(d)
		inet.children(d, served)
	}
	if d.unsure6Wanted() {
		inet.unsure6(d)
	}
	if d.UplinkMarks != nil {
		inet.uplinkMarks(d.UplinkMarks, d.Subnets)
	}
	ls := []*layout{inet}
	sources := d.unsureSources()
	if d.Map != nil || d.Mapping != nil || len(sources) > 0 {
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
		if len(sources) > 0 {
			ip.unsure(d, sources)
		}
		if d.Map != nil {
			kinds := ip.kinds(d.Map)
			ip.admit(d, kinds)
			ip.keepSource()
			ip.learn(d, kinds)
		}
		if d.Mapping != nil {
			ip.mapping(d)
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
	s := l.set(name, nftables.TypeIFName)
	s.KeyByteOrder = binaryutil.NativeEndian // else nft lists the names wrong
	for _, link := range slices.Compact(slices.Sorted(slices.Values(links))) {
		s.elements = append(s.elements, nftables.SetElement{Key: nfnl.LinkKey(link)})
	}
	return s
}

// outside tests the name of a link. To compare it with one is cheaper than to look
// it up among several.
func (l *layout) outside(name operand, is bool) exprs {
	switch {
	case len(l.links) != 1:
		return name.lookup(l.named(outsideSet), !is)
	case is:
		return name.is(nfnl.LinkKey(l.links[0]))
	}
	return name.isNot(nfnl.LinkKey(l.links[0]))
}

// named returns the set of a name, nil without one.
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

// regular adds a chain that only others lead to.
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
