package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"reflect"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/evidence"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A firewall has the daemon's own nftables tables, and what the daemon knows of the
// user's rules. The reconcile owns it. Without nftables in the kernel it has no tables,
// and warns.
type firewall struct {
	features
	name    string
	tables  *rules.Tables // nil without nftables
	mapping bool          // the tables have rules for mapping

	// What the tables serve.
	withMap     bool
	helpers     []string // on anchors; none without expectations
	ports       outsidePorts
	portInPool  uint16                    // port of a socket that the warning names
	decisions   map[netip.Prefix]decision // replaced as a whole, never modified
	mappedLinks []string                  // current and former outside links: the latter keep their mappings
	mappedAddrs map[cone.Addr]struct{}    // outside addresses that mappings had
	holders     map[cone.Addr]string      // outside links by their addresses, when mappings moved last
	leftBy      []string                  // leaving4 then
	movedBy     *userrules.Ruleset        // the user's rules then
	choosers    []userrules.SourceNAT     // rules of the user's that choose outside ports
	sources     []userrules.SourceNAT     // all rules that translate sources, if mappings are wanted
	ownAddrs    map[string]netip.Addr     // what a masquerade gives, by link
	exempt      []userrules.SourceNAT     // what rules name as untranslated, if mappings are wanted
	elsewhere   []netip.Prefix            // destinations to which rules give another address, or none
	old         oldPorts                  // ports that mappings may still have and must lose
	behind      map[[2]uint64]bool        // the user's chains that run after ours, by their handles; nil: unknown
	overtaken   bool                      // a chain of the user's translates all mapped traffic before ours
	sides       rules.Desired             // the part that depends on links
	withVRF     bool                      // the gateway has a VRF
	leaving4    []string                  // outside links by which IPv4 packets leave
	around      surroundings
	last        *rules.Desired // as set last; nil before the first time

	zones cone.Zones // of flows, as the rules serve them

	known       map[cone.Addr]struct{} // addresses that links have, or had; nil before the first look
	knownMapped bool                   // with those that the tables hold for mappings
	lost        []netip.Addr           // of known, when mappings on lost addresses were looked at last

	reached []netip.Prefix // hosts to which the user forwards ports
	shut    []cone.Shut    // what the user's firewall does not let through to them
	// shutAsked is the question to which shut is the answer.
	shutAsked childQuestion

	diverter    userrules.Diverter
	diverted    []userrules.Diversion // as last read, merged
	divertedOwn []netip.Addr          // the gateway's addresses then
	endsAny     bool                  // children that diverted concerns may still live

	admitted, expected, usedUp evidence.Count
	zoned, unexpected          evidence.InZone              // packets to what the map serves, and to the rest
	counted                    control.Tables               // as read last
	counts                     rules.Counters               // likewise
	witnesses                  map[netip.Prefix]*witnesses  // by subnet
	passedBefore               map[netip.Prefix]cone.Passed // as it was before counts was read
	nowhere                    nowhere
	unsure                     unsureFlows
	helped                     helped
	counting                   []counting                          // what witnesses and nowhere have counted by
	retry                      evidence.Retry                      // of evidence against rules
	dumped                     bool                                // flows were dumped since evidence was read last
	pools                      map[config.PortPool]cone.PortRanges // the pools that usedUp counts for

	// The user's rules, as read last.
	reader *userrules.Reader  // nil before the first time
	user   *userrules.Ruleset // nil before the first successful read
	unread error              // why the last read failed
	marker *userrules.Marker  // of the rules marked
	marked *userrules.Ruleset // nil before the first time

	// What they forward, as found last.
	forwarder     userrules.Forwarder
	forwarded     *userrules.Covered  // what may be forwarded
	understood    *userrules.Covered  // the part that understood rules forward
	shared        *userrules.Covered  // that part without 1:1 NAT
	taken         *userrules.Covered  // packets that are forwarded for certain
	hidden        *userrules.Covered  // endpoints of which every packet is, if proxies listen
	forwardsKnown bool                // there are no other forwards
	told          []userrules.Forward // those to warn of, if they are no 1:1 NAT
	telling       struct {            // those that are none
		all, understood []userrules.Forward
		of              *userrules.Ruleset // by these rules; nil before they were found
		own             map[string]netip.Addr
	}
	destinations cone.AddrRanges // to which they lead packets on, if rules name them
	published    cone.AddrRanges // those that are not the gateway's

	repaired uint64 // how often others' changes of the tables were undone
}

// openRules is rules.Open, except in tests of a kernel without nftables.
var openRules = rules.Open

func openFirewall(name string) (*firewall, error) {
	t, err := openRules(rules.Config{Name: name})
	if missing := new(rules.UnsupportedError); errors.As(err, &missing) {
		return &firewall{name: name, features: noFeatures(missing)}, nil
	}
	if errors.Is(err, rules.ErrForeignTable) {
		return nil, fmt.Errorf(`%w with the key "table"`, err)
	}
	if err != nil {
		return nil, err
	}
	mapped, err := t.MappedLinks()
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return &firewall{name: name, tables: t, features: featuresOf(t), mappedLinks: mapped}, nil
}

// setSides takes from n the addresses of links, which links share a network segment, and which
// outside links are so only for one IP version or some peers, or lead inside too. n has the routes by
// outside links (Network.Lean leaves them out).
func (f *firewall) setSides(n gateway.Network) {
	f.sides = rules.Desired{
		Segments: n.Segments(), Bridges: n.Bridges(),
		Not4: n.Without(gateway.IPv4), Not6: n.Without(gateway.IPv6), Partial: n.Partial(),
	}
	f.sides.OneArmed, f.sides.Far = n.OneArmed()
	f.ownAddrs = ownAddrs(n)
	f.leaving4 = slices.DeleteFunc(n.OutsideLinks4(), func(name string) bool { return !n.Has4(name) || n.OnlyReceives(name) })
	f.withVRF = slices.ContainsFunc(n.Links, func(l gateway.Link) bool { return l.Kind == "vrf" })
}

// set brings the tables to the state that the configuration wants, and reports whether it had
// to change them. If the last call wanted the same, somebody else had changed them: this
// counts as a repair.
func (f *firewall) set(cfg config.Config, outside []string) (changed bool, err error) {
	if f.tables == nil {
		return false, nil
	}
	f.observe(cfg, outside)
	d := f.desired(cfg, outside)
	changed, err = f.tables.Set(d)
	if changed && f.last != nil && reflect.DeepEqual(d, *f.last) {
		f.repaired++
	}
	if err == nil {
		f.last = &d
		f.helped.read = f.helped.read && !changed
	}
	f.mapping = err == nil && d.Mapping != nil && f.maps()
	if f.tables.Leads() {
		f.look() // all chains that are there now are older than ours
		f.behind = nil
		if f.unread == nil {
			f.behind = map[[2]uint64]bool{}
			for _, c := range f.user.SourceNATChains() {
				f.behind[c.Handles] = true
			}
		}
	}
	return changed, err
}

func (f *firewall) withExpectations() bool { return len(f.helpers) > 0 }

// labelsChildren reports whether the map admits children, and labels them.
func (f *firewall) labelsChildren() bool { return f.withMap && f.labels() }

// sure removes the flows whose source may be spoofed. It must list them after flows was
// read: the kernel remembers such a flow before it enters the conntrack table.
func (f *firewall) sure(flows []cone.Flow) ([]cone.Flow, error) {
	if f.tables == nil {
		return flows, nil
	}
	kernel, unsure := f.tables.NewUnsure(), map[elements.Direction]struct{}{}
	if err := kernel.List(func(d elements.Direction) { unsure[d] = struct{}{} }); err != nil {
		return nil, err
	}
	var alive []elements.Direction
	flows = slices.DeleteFunc(flows, func(x cone.Flow) bool {
		d := elements.Direction{Src: x.Src, Dst: x.Dst}
		_, is := unsure[d]
		if is {
			alive = append(alive, d)
		}
		return is
	})
	kernel.Renew(alive)
	return flows, nil
}

// learns reports whether the kernel adds permissions by itself.
func (f *firewall) learns(cfg config.Config) bool {
	return f.withMap && cfg.Learn && f.has(rules.FeatureLearn)
}

// keepAlive lets the kernel go on learning after the daemon's death: for as long as what it knows
// then may last, but for AliveTimeout at least. A reconcile renews this when half of it is left.
func (f *firewall) keepAlive(cfg config.Config) error {
	if !f.learns(cfg) && !f.mapping {
		return nil
	}
	return f.tables.NewAlive().Keep(max(elements.AliveTimeout, cfg.Lifetime, 4*cfg.Reconcile))
}

// openMap makes the map of permissions, or finds the one that an earlier daemon
// left.
func (f *firewall) openMap(cfg config.Config, outside []string) (*elements.Map, error) {
	if err := f.noMap(); err != nil {
		return nil, err
	}
	f.withMap = true
	if _, err := f.set(cfg, outside); err != nil {
		return nil, err
	}
	// An earlier daemon may have let the kernel hide flows.
	return f.tables.NewMap(mapConfig(cfg)), errors.Join(f.tables.NewLean().Off(), f.tables.NewQuiet().Off())
}

// look reads the user's rules. The other methods answer from what it read.
func (f *firewall) look() {
	if f.reader == nil {
		c := userrules.Config{OwnChain: rules.MarkerChain}
		if f.tables != nil {
			c.Changes = f.tables.OthersChanges
		}
		f.reader = userrules.NewReader(c)
	}
	rs, err := f.reader.Read()
	if f.unread = err; err == nil {
		f.user = rs
	}
}

func outsideLinks(network gateway.Network) (links []userrules.Link) {
	for _, l := range network.Links {
		if l.Outside != 0 {
			link := flows.LinkOf(l)
			link.Addrs = network.AddrsOf(l)
			links = append(links, link)
		}
	}
	return links
}

// insideLinks returns the links that lead to enabled subnets.
func insideLinks(network gateway.Network) (links []userrules.Link) {
	for _, l := range network.Links {
		if l.Inside {
			links = append(links, flows.LinkOf(l))
		}
	}
	return links
}

// fixedSources returns the addresses to which the user's rules translate sources, and whether
// there may be others.
func (f *firewall) fixedSources() (addrs cone.AddrRanges, unknown bool) {
	if f.unread != nil || f.user == nil {
		return nil, true
	}
	return f.user.FixedSources()
}

// uplinks returns the names of the links that lead outside according to rules of the user's
// that name them.
func (f *firewall) uplinks(links []userrules.LAN) ([]string, error) {
	if f.unread != nil {
		return nil, f.unread
	}
	return f.user.NamedUplinks(links)
}

// read returns what status shows of the tables. If they cannot be read, it returns the last
// reading, since evidence is drawn from it, too.
func (f *firewall) read(cfg config.Config) (t control.Tables, err error) {
	if f.tables == nil {
		return t, nil
	}
	c, err := f.tables.Counters()
	if err != nil {
		return f.counted, fmt.Errorf("read counters: %w", err)
	}
	f.counts = c
	if !samePools(f.pools, f.ports.pools) {
		f.pools, f.usedUp = f.ports.pools, evidence.Count{}
	}
	f.counted = control.Tables{
		Repaired: f.repaired,
		Map:      control.Map{Learn: f.learns(cfg), Admitted: f.admitted.Read(c.Admitted())},
		Expected: control.Expected{Admitted: f.expected.Read(c.Expected())},
		Mapping:  control.Mapping{On: f.mapping, PoolUsedUp: f.usedUp.Read(c.PoolUsedUp())},
	}
	f.counted.Count(c)
	f.zoned.Packets.Read(c.Zoned())
	f.unexpected.Packets.Read(c.Unexpected())
	f.unsure.flows.Read(c["unsure"])
	return f.counted, nil
}

// remove removes the tables from the kernel, and with them all permissions in the
// map.
func (f *firewall) remove() error {
	if f.tables == nil {
		return nil
	}
	return f.tables.Remove()
}

// close lets go of the tables, which stay as they are.
func (f *firewall) close() error {
	var errs []error
	if f.reader != nil {
		errs = append(errs, f.reader.Close())
	}
	if f.tables != nil {
		errs = append(errs, f.tables.Close())
	}
	return errors.Join(errs...)
}

// router returns a Router for the packets of inside hosts, by the rules that were last read. With
// uplink_marks our own rules set marks, too.
func (f *firewall) router(cfg config.Config, network gateway.Network) *flows.Router {
	var marker *userrules.Marker
	if !cfg.UplinkMarks && f.user != nil && f.unread == nil {
		marker = f.markerOf(f.user)
	}
	return flows.NewRouter(network, marker)
}

// markerOf returns the Marker of rules.
func (f *firewall) markerOf(rs *userrules.Ruleset) *userrules.Marker {
	if f.marker == nil || f.marked != rs {
		f.marker, f.marked = rs.Marker(), rs
	}
	return f.marker
}
