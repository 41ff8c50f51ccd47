//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"hash/fnv"
	"maps"
	"math"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// markerChain is empty and only says whose the table is.
const markerChain = "made_by_conenatd"

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
)

// Names of sets.
const (
	outsideSet       = "outside"
	admittedSet      = "admitted_flows"
	learnedSet       = "learned_flows"
	learnersSet      = "learners"
	repeatersSet     = "repeaters"
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
}

// A set is one with the elements that we want, or one whose elements come and
// go.
type set struct {
	*nftables.Set
	elements []nftables.SetElement
	free     bool
}

// newLayouts returns the contents of both tables that do what d wants; without
// a map and mappings there is but one.
func newLayouts(name string, d Desired) ([]*layout, error) {
	inet := newLayout(name, nftables.TableFamilyINet, d.OutsideLinks)
	served := familiesOf(d.Subnets)
	if d.Guard {
		inet.guard(served)
	}
	if d.Spoofed && !d.noFib {
		inet.spoofed(d)
	}
	if len(d.Helpers) > 0 {
		inet.portZero(d.Subnets)
		inet.children(d, served)
	}
	ls := []*layout{inet}
	if d.Map != nil || d.Mapping != nil {
		ip := newLayout(name, nftables.TableFamilyIPv4, d.OutsideLinks)
		if d.Map != nil {
			ip.permissions(d.Map)
			if !d.noFib {
				ip.unsure(d, d.Map.Subnets)
			}
			kinds := ip.kinds(d.Map)
			ip.admit(kinds, d.Map)
			ip.keepSource()
			ip.learn(d, kinds)
		}
		if d.Mapping != nil {
			ip.mapping(d.Mapping)
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
	l.chains = append(l.chains, &nftables.Chain{Table: l.table, Name: markerChain})
	l.links = slices.Compact(slices.Sorted(slices.Values(outside)))
	if len(l.links) == 1 {
		return l
	}
	links := l.set(outsideSet, nftables.TypeIFName)
	links.KeyByteOrder = binaryutil.NativeEndian // else nft lists the names wrong
	for _, name := range l.links {
		links.elements = append(links.elements, nftables.SetElement{Key: linkKey(name)})
	}
	return l
}

// outside tests the name of a link. To compare it with one is cheaper than to look
// it up among several.
func (l *layout) outside(name piece, is bool) piece {
	if len(l.links) != 1 {
		return join(name, piece{&expr.Lookup{SourceRegister: reg, SetName: outsideSet, Invert: !is}})
	}
	op := expr.CmpOpNeq
	if is {
		op = expr.CmpOpEq
	}
	return join(name, piece{&expr.Cmp{Op: op, Register: reg, Data: linkKey(l.links[0])}})
}

// spoofed drops what comes from outside with the source of a host that is inside: it
// would earn that host a permission, or keep one alive. A host that is reached by an
// outside link is not spoofed, nor is one that comes through IPsec, and what is for the
// gateway is the user's to judge. Where the way back depends on marks nobody can tell
// here: then the caller does not set Desired.Spoofed, and unsure does what is needed.
func (l *layout) spoofed(d Desired) {
	l.counters = append(l.counters, spoofedCounter)
	c := l.filter("spoofed", nftables.ChainHookPrerouting, rawPriority)
	if len(d.Subnets) > fewPrefixes {
		l.rule(c, "", join(l.outside(iifname, false), accept))
	}
	test := join(isUDP, noWayBack)
	if !d.noIPsec {
		test = join(isUDP, noSecurityPath, noWayBack)
	}
	for _, name := range l.links { // nft 1.0.6 cannot look up what fib finds in a set
		test = join(test, wayBack, isNot(linkKey(name)))
	}
	test = join(test, forwarded, drop(spoofedCounter))
	for _, p := range d.Subnets {
		// The source comes first, for it sorts out nearly all packets.
		l.rule(c, "the way back is not outside", join(sourceIn(p), l.outside(iifname, true), test))
	}
}

// fewPrefixes are tested quicker than a link.
const fewPrefixes = 4

// portZero drops what would match an anchor: packets between a subnet and elsewhere with
// port 0 on one side. It asks for the port first, for hardly a packet has that.
func (l *layout) portZero(subnets []netip.Prefix) {
	l.counters = append(l.counters, zeroCounter)
	like := l.regular("like_an_anchor")
	c := l.filter("port_zero", nftables.ChainHookPrerouting, rawPriority)
	l.rule(c, "", join(sourcePort, is(be16(0)), isUDP, goTo(like)))
	l.rule(c, "", join(destinationPort, is(be16(0)), isUDP, goTo(like)))
	for _, f := range familiesOf(subnets) {
		inside := l.set(subnetsSet+f.name, f.addr)
		inside.Interval, inside.elements = true, f.intervals(subnets)
		for _, way := range []piece{
			join(f.source, in(inside), f.destination, notIn(inside)),
			join(f.source, notIn(inside), f.destination, in(inside)),
		} {
			l.rule(like, "no packet may match an anchor", join(f.is, way, drop(zeroCounter)))
		}
	}
}

// guard serves the families of subnets that are enabled.
func (l *layout) guard(served []*ipFamily) {
	if len(served) == 0 {
		return
	}
	l.counters = append(l.counters, guardCounter)
	guard := l.filter("guard", nftables.ChainHookInput, guardPriority)
	l.rule(guard, "conntrack knows it", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	l.rule(guard, "", join(notUDP, accept))
	l.rule(guard, "", join(l.outside(iifname, false), accept))
	l.rule(guard, "a socket waits for it", join(hasSocket, accept))
	l.rule(guard, "it would keep the peer from the inside host", join(onlyOf(served), drop(guardCounter)))
}

// children judges the first packets of flows that our expectations let in. Those have a
// master with a helper of ours; what a helper of the user's expects may come from
// anywhere. Only flows without an answer, and ICMP errors, are related.
func (l *layout) children(d Desired, served []*ipFamily) {
	l.counters = append(l.counters, spoofedCounter, zeroCounter, expectedCounter)
	child := l.regular("child")
	c := l.filter("children", nftables.ChainHookForward, childPriority)
	l.rule(c, "", join(ctState, isNot(ne32(expr.CtStateBitRELATED)), accept))
	for _, helper := range d.Helpers {
		// The first packet has the one bit and not yet the other.
		l.rule(c, "the first packet of a child", join(
			onlyOf(served), ctStatus, masked(ctExpected|ctConfirmed), is(ne32(ctExpected)), isUDP, ctHelper, is(helperName(helper)), goTo(child)))
	}
	for _, f := range served {
		for _, port := range []expr.CtKey{expr.CtKeyPROTOSRC, expr.CtKeyPROTODST} {
			// No packet makes a flow assured that has no reply.
			l.rule(c, "an ICMP error about an anchor", join(
				ctStatus, masked(ctSeenReply|ctAssured), is(ne32(ctAssured)),
				l4proto, is([]byte{f.icmp}), original(port, 0), is(be16(0)), drop(zeroCounter)))
		}
	}
	l.rule(child, "not by an outside link: the peer's address is faked", join(l.notOutside(d.Uppers), drop(spoofedCounter)))
	l.rule(child, "it would look like an anchor", join(sourcePort, is(be16(0)), isUDP, drop(zeroCounter)))
	if d.MaxChildren > 0 {
		l.counters = append(l.counters, childCounter)
		for _, f := range served {
			// Each element keeps the limit that it was made with.
			kids := l.set(fmt.Sprintf("children%s_%d", f.name, d.MaxChildren), f.addr, f.addr, nftables.TypeInetService)
			kids.Dynamic, kids.free = true, true
			l.rule(child, "flows of one peer to one outside endpoint",
				join(f.is, isUDP, f.key, over(kids, d.MaxChildren), drop(childCounter)))
		}
	}
	l.rule(child, "it goes on to the user's firewall", count(expectedCounter))
}

// notOutside matches what the forward hook sees of packets that came by no outside link:
// of a link in a VRF it is the name of that, and the link's own apart. Links that share
// a network are as good as each other.
func (l *layout) notOutside(uppers map[string]string) (test piece) {
	shared := map[string]bool{}
	for upper, lower := range uppers {
		if slices.Contains(l.links, upper) != slices.Contains(l.links, lower) {
			shared[upper], shared[lower] = true, true
		}
	}
	for _, name := range []piece{iifname, sdifname} {
		test = join(test, l.outside(name, false))
		for _, link := range slices.Sorted(maps.Keys(shared)) {
			if !slices.Contains(l.links, link) {
				test = join(test, name, isNot(linkKey(link)))
			}
		}
	}
	return test
}

// permissionKey is peer . outside address . outside port, as they lie in a packet.
var permissionKey = []nftables.SetDatatype{nftables.TypeIPAddr, nftables.TypeIPAddr, nftables.TypeInetService}

func (l *layout) permissions(c *MapConfig) {
	for _, values := range []struct {
		of   string
		typ  nftables.SetDatatype
		size int
	}{
		{elements.PermissionMap, nftables.TypeIPAddr, c.Size}, {elements.PortMap, nftables.TypeInetService, c.Size}, {elements.MarksMap, nftables.TypeMark, marksSize},
	} {
		m := l.set(values.of, permissionKey...)
		m.IsMap, m.DataType = true, values.typ
		m.HasTimeout, m.Timeout, m.Dynamic, m.free, m.Size = true, savedTimeout, true, true, uint32(values.size)
	}
	l.noPeers = l.set(noPeersSet, nftables.TypeIPAddr)
	l.noPeers.Interval, l.noPeers.elements = true, intervals(slices.Concat(notUnicast, c.Subnets, c.ExcludePeers))
}

// A kind of permissions is for one peer, for the peers of groups that leave so
// many low bits free, or for everybody.
type kind struct {
	wild   uint8
	groups *set // with the first address of each, nil for the others
	open   *set // with the inside subnets, for everybody
}

// kinds makes the sets that the kinds need and returns them, the ones for few
// peers first.
func (l *layout) kinds(c *MapConfig) []kind {
	free := map[uint8][]nftables.SetElement{}
	for _, g := range c.PeerGroups {
		if wild := 32 - g.Bits(); g.Addr().Is4() && wild > 0 {
			free[uint8(wild)] = append(free[uint8(wild)], nftables.SetElement{Key: g.Addr().AsSlice()})
		}
	}
	all := []kind{{}}
	for _, wild := range slices.Sorted(maps.Keys(free)) {
		s := l.set(groupsName(32-int(wild)), nftables.TypeIPAddr)
		s.elements = free[wild]
		all = append(all, kind{wild: wild, groups: s})
	}
	if open := intervals(c.OpenSubnets); len(open) > 0 {
		s := l.set(openSet, nftables.TypeIPAddr)
		s.Interval, s.elements = true, open
		all = append(all, kind{wild: 32, open: s})
	}
	return all
}

func groupsName(bits int) string { return fmt.Sprintf("%s_%d", groupsSet, bits) }

// peers clears the low bits of the peer's address, which load puts into reg.
func (k kind) peers(load piece) piece {
	if k.wild == 0 {
		return load
	}
	return join(load, piece{&expr.Bitwise{
		SourceRegister: reg, DestRegister: reg,
		Len: 4, Mask: net.CIDRMask(32-int(k.wild), 32), Xor: make([]byte, 4),
	}})
}

// ofGroup matches if the peer is in a group of this kind.
func (k kind) ofGroup(load piece) piece {
	if k.groups == nil {
		return nil
	}
	return join(k.peers(load), in(k.groups))
}

// packetKey and flowKey are the key of the map, from a packet that comes in, and
// from a flow that goes out. Each rule tests for UDP, though only UDP gets there: nft
// needs that to know what a port is.
func (k kind) packetKey() piece { return join(isUDP, k.ofGroup(packetSource), k.loadPacket()) }

// loadPacket and loadFlow load the key alone. nft loads it anew for each map, and so do
// our rules, or those that nft loads from its listing would be others.
func (k kind) loadPacket() piece {
	return join(k.peers(packetSource), packetDestination, transport(2, 2))
}

func (k kind) loadFlow() piece {
	return join(k.peers(ctReplySource), reply(expr.CtKeyDSTIP, 1), reply(expr.CtKeyPROTODST, 2))
}

func (k kind) flowKey() piece { return join(isUDP, k.ofFlow(), k.loadFlow()) }

// ofFlow matches if a flow gives a permission of this kind.
func (k kind) ofFlow() piece {
	if k.open != nil {
		return join(ctOriginalSource, in(k.open))
	}
	return k.ofGroup(ctReplySource)
}

// admit needs no conntrack state: a NAT chain sees the first packet only.
//
// An element carries the cap on its children, a token bucket: looking up one that
// is empty fails, which costs far less than to count flows. What fails goes on like
// any unsolicited packet, to the guard as a rule.
func (l *layout) admit(kinds []kind, c *MapConfig) {
	l.counters = append(l.counters, admittedCounter)
	admitted := &nftables.Chain{Table: l.table, Name: "admitted"}
	l.chains = append(l.chains, admitted)
	admit := l.chain("admit", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, admitPriority)
	l.rule(admit, "permissions are of the default zone", join(isUDP, l.outside(iifname, true), ctZone, is(ne16(0)), goTo(admitted)))
	l.rule(admitted, "the gateway itself serves it", join(hasSocket, accept))
	flows := l.set(admittedSet, flowKey...)
	flows.HasTimeout, flows.Dynamic, flows.free = true, true, true
	flows.Timeout, flows.Size = admittedTimeout, admittedSize
	mark := setLabel
	if c.noLabels {
		mark = nil
	}
	for _, k := range kinds {
		if k.open != nil {
			l.rule(admitted, "", join(packetSource, in(l.noPeers), accept))
		}
		l.rule(admitted, "a mark for policy routing", join(k.packetKey(), inheritMark))
		l.rule(admitted, "a peer may send from any port", join(k.packetKey(), lookUp(elements.PortMap, valueWord+1), k.loadPacket(), toInside(mark)))
	}
}

// keepSource lets the inside host see the peer's own address, as it does with an
// expectation, where the user's rules translate what comes in. What a rule of the user's
// forwards is his: it never reaches the chain admitted.
func (l *layout) keepSource() {
	c := l.chain("keep_source", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, sourcePriority)
	l.rule(c, "the inside host sees the peer itself", join(
		l.outside(iifname, true), ctStatus, masked(ctDstNAT), isNot(ne32(0)), isUDP, originalFlow, piece{&expr.Lookup{SourceRegister: reg, SetName: admittedSet}},
		packetSource, piece{&expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: reg}}))
}

func (l *layout) learn(d Desired, kinds []kind) {
	c := d.Map
	if !c.Learn {
		return
	}
	learn := l.filter("learn", nftables.ChainHookPostrouting, learnPriority)
	l.rule(learn, "answered flows end here", join(ctState, isNot(ne32(expr.CtStateBitNEW)), accept))
	l.rule(learn, "a source may be spoofed", join(l.outside(iifname, true), accept))
	l.rule(learn, "", join(notUDP, accept))
	l.counters = append(l.counters, learnedCounter, limitedCounter)
	var subnets *set
	if i := slices.IndexFunc(l.sets, func(s *set) bool { return s.Name == subnetsSet }); i >= 0 {
		subnets = l.sets[i]
	} else {
		subnets = l.set(subnetsSet, nftables.TypeIPAddr)
		subnets.Interval, subnets.elements = true, intervals(c.Subnets)
	}
	peerPorts, ports := l.set(excludedPeerSet, nftables.TypeInetService), l.set(excludedPortsSet, nftables.TypeInetService)
	peerPorts.setPorts(c.ExcludePeerPorts)
	ports.setPorts(c.ExcludePorts)
	learners := l.set(learnersSet, nftables.TypeIPAddr)
	learners.HasTimeout, learners.Timeout, learners.Dynamic, learners.free = true, learnerTimeout, true, true
	denied := l.set(elements.DeniedSet, permissionKey...)
	denied.HasTimeout, denied.free, denied.Size = true, true, elements.DeniedSize

	l.rule(learn, "", join(l.outside(oifname, false), accept))
	l.rule(learn, "", join(ctStatus, masked(ctSrcNAT), is(ne32(0)), accept))
	l.rule(learn, "permissions are of the default zone", join(ctZone, isNot(ne16(0)), accept))
	l.rule(learn, "", join(ctOriginalSource, notIn(subnets), accept))
	if !d.noFib {
		l.rule(learn, "a source may be spoofed", join(isUnsure, accept))
	}
	l.rule(learn, "", join(ctReplySource, in(l.noPeers), accept))
	l.rule(learn, "", join(isUDP, ctReplySourcePort, in(peerPorts), accept))
	l.rule(learn, "", join(isUDP, ctReplyDestinationPort, in(ports), accept))
	// A look-up takes a token. Whoever sends on without an answer must not take those
	// of his own children, and yet be learned again when his permission has run out.
	repeaters := l.set(repeatersSet, permissionKey...)
	repeaters.HasTimeout, repeaters.Timeout, repeaters.Dynamic, repeaters.free = true, learnerTimeout, true, true
	l.rule(learn, "a flow that was seen, but for six packets a minute",
		join(ctStatus, masked(ctConfirmed), isNot(ne32(0)), kinds[0].flowKey(), repeated(repeaters), accept))

	slices.Reverse(kinds) // a flow gives the permission for the most peers
	for _, k := range kinds {
		l.rule(learn, "the daemon forbids it", join(k.flowKey(), in(denied), accept))
	}
	l.rule(learn, "too many at a time", join(ctOriginalSource, limited(learners, c.LearnRate), count(limitedCounter), accept))
	// No two flows have the same answers. If an earlier flow had those of this one, it has
	// ended, and this flow's host has the outside port now: the peer's packets must not
	// reach the earlier host any more.
	flows := l.set(learnedSet, flowKey...)
	flows.HasTimeout, flows.Timeout, flows.Dynamic, flows.free, flows.Size = true, savedTimeout, true, true, uint32(min(c.Size, learnedSize))
	for _, k := range kinds {
		l.rule(learn, "a flow with the same answers has ended", join(
			ctStatus, masked(ctConfirmed), is(ne32(0)), isUDP, replyFlow, in(flows),
			k.ofFlow(), k.loadFlow(), flowPort, removeFrom(elements.PortMap), k.loadFlow(), flowAddr, removeFrom(elements.PermissionMap),
			k.loadFlow(), flowMark, removeFrom(elements.MarksMap)))
	}
	l.rule(learn, "", join(isUDP, replyFlow, piece{&expr.Dynset{SrcRegKey: reg, SetName: flows.Name, Operation: unix.NFT_DYNSET_OP_UPDATE, Timeout: c.Lifetime}}))
	for _, k := range kinds {
		l.rule(learn, "", join(ctMark, isNot(ne32(0)), k.flowKey(), flowMark, piece{addTo(elements.MarksMap, c.Lifetime)}))
		l.rule(learn, "one that is there stays as it is",
			join(k.flowKey(), flowPort, piece{addTo(elements.PortMap, c.Lifetime)},
				k.loadFlow(), flowAddr, learned(c, k.wild), count(learnedCounter), accept))
	}
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

// helperName is the name of a conntrack helper, as nft compares it.
func helperName(name string) []byte {
	const size = 16 // NF_CT_HELPER_NAME_LEN
	return append([]byte(name), make([]byte, size-len(name))...)
}

func linkKey(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key[:unix.IFNAMSIZ-1], name)
	return key
}
