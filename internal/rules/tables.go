package rules

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// Tables are our tables in one network namespace. They are not safe for concurrent use, but
// their Map may be used concurrently with them.
//
// If the kernel has both flags (Linux 6.9), the connection owns the tables and they
// persist: nobody else can change them, "nft flush ruleset" skips them, and they outlive
// the process, so that the next process can take them over. With the flag owner alone they
// would end with the process.
type Tables struct {
	c         *conn // for reading
	w         *writer
	name      string
	netns     int
	flags     nftables.TableFlags
	port      uint32 // port ID of w, by which the kernel identifies the owner
	missing   []*UnsupportedError
	noIPsec   bool                    // the kernel has no IPsec policies, so no rule need test for them
	look      *nfnl.Conn              // for Changed; nil before its first call
	noSecPath bool                    // the kernel has no packets that came through IPsec
	noNumgen  bool                    // the kernel has no random numbers (CONFIG_NFT_NUMGEN)
	noCount   bool                    // the kernel cannot count the children of a peer (CONFIG_NFT_CONNLIMIT)
	mapped    elements.MappingsConfig // what the last Set made
	written   map[writtenSet]uint64   // hashes of our sets' elements, if nobody else may write
	others    uint32                  // the number at the last call of Changed
	leads     bool                    // the last Set made the chain of MapPriority
}

// A writer is the connection that owns the tables. All that write elements share it,
// because the kernel lets no other connection write.
type writer struct {
	*elements.Writer // has the lock
	*conn
	batch *nfnl.Conn
}

// Open probes what the kernel offers. It changes nothing. The error is an *UnsupportedError
// if there is no nftables, and wraps ErrForeignTable or ErrOwned if a table is not ours.
func Open(cfg Config) (*Tables, error) {
	t := &Tables{name: cmp.Or(cfg.Name, DefaultName), netns: cfg.NetNS}
	err := t.open()
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

func (t *Tables) open() error {
	var err error
	if t.c, err = dial(t.netns); err != nil {
		return err
	}
	w, err := dial(t.netns)
	if err != nil {
		return err
	}
	t.w = &writer{conn: w}
	if t.w.batch, err = nfnl.Over(w.nl); err != nil {
		return err
	}
	t.w.Writer = elements.NewWriter(t.w.batch, t.netns, t.name)
	if t.port, err = w.GetPortID(); err != nil {
		return err
	}
	if err = t.probe(); err != nil {
		return err
	}
	_, err = t.readAll(nil)
	return err
}

// Missing returns the features that the kernel lacks. Set leaves them out.
func (t *Tables) Missing() []*UnsupportedError { return t.missing }

// Owned reports whether nobody else can change the tables.
func (t *Tables) Owned() bool { return t.flags&nftables.TableFlagOwner != 0 }

// Lacks reports whether the kernel lacks a feature.
func (t *Tables) Lacks(f Feature) bool {
	return slices.ContainsFunc(t.missing, func(m *UnsupportedError) bool { return m.Feature == f })
}

// possible is d without the features that the kernel lacks.
func (t *Tables) possible(d Desired) Desired {
	d.noIPsec = t.noSecPath
	d.Guard = d.Guard && !t.Lacks(FeatureGuard)
	if t.Lacks(FeatureSpoofed) {
		d.noFib, d.OneArmed, d.Far = true, nil, nil // nothing could tell inside from outside there
	}
	if t.Lacks(FeatureWayBack) {
		d.noWayBack, d.OneArmed, d.Far = true, nil, nil
	}
	d.noForwardFib = t.Lacks(FeaturePartial)
	if t.Lacks(FeatureMaxChildren) {
		d.MaxChildren = 0
	}
	d.Quiet = d.Quiet && !t.Lacks(FeatureQuiet)
	if t.Lacks(FeatureUplinkMarks) {
		d.UplinkMarks = nil
	}
	switch {
	case d.Map == nil:
	case t.Lacks(FeatureMap):
		d.Map = nil
	default:
		m := t.possibleMap(*d.Map)
		d.Map = &m
	}
	switch {
	case d.Mapping == nil:
	case t.Lacks(FeatureMapping):
		d.Mapping = nil
	default:
		m := *d.Mapping
		m.noIPsec = t.noIPsec
		d.Mapping = &m
	}
	return d
}

func (t *Tables) possibleMap(c MapConfig) MapConfig {
	if t.Lacks(FeatureLearn) {
		c.Learn, c.MaxChildren = false, 0
	}
	c.noLabels, c.noNumgen, c.noCount = t.Lacks(FeatureLabels), t.noNumgen, t.noCount
	return c
}

// Leads reports whether the last Set made the chain of MapPriority anew: then it runs
// before all older chains of that priority.
func (t *Tables) Leads() bool { return t.leads }

// Set makes the tables do what d wants, in one transaction, except for the features that
// Missing returns, and makes us their owner. It changes nothing if the tables are right
// already, and repairs them if somebody changed them. It reports whether it changed
// something. Counters keep their values and permissions stay; the counts of children stay
// unless the cap changes.
func (t *Tables) Set(d Desired) (changed bool, err error) {
	t.leads = false
	d = t.possible(d)
	want, err := newLayouts(t.name, d)
	if err != nil {
		return false, err
	}
	t.mapped = mappedOf(&d)
	have, err := t.readAll(want)
	if err != nil {
		return false, err
	}
	// Compare without the lock, because grants wait for it.
	if t.holds(have, want) {
		t.note(want)
		return false, nil
	}
	t.written = nil
	t.w.Lock()
	defer t.w.Unlock()
	for i, h := range have {
		if h.table != nil && h.table.Flags == t.flags&^nftables.TableFlagOwner {
			// The kernel requires a separate transaction for a new owner.
			t.w.AddTable(t.owned(tables[i]))
			if err := t.flush("take over"); err != nil {
				return false, err
			}
			h.table.Flags = t.flags
		}
	}
	for i, h := range have {
		l := layoutOf(want, tables[i])
		switch made, err := t.makeMarks(h, l); {
		case err != nil:
			return false, err
		case made:
			if have[i], err = t.read(t.owned(tables[i]), l); err != nil {
				return false, err
			}
		}
	}
	leads := false
	for i, h := range have {
		l := layoutOf(want, tables[i])
		leads = leads || makes(h, l, sourceChain, t.flags)
		changed = t.change(tables[i], h, l) || changed
	}
	if !changed {
		return false, nil
	}
	err = t.flush("set")
	switch {
	case errors.Is(err, unix.ENOENT):
		err = fmt.Errorf("%w (somebody changed it meanwhile)", err)
	case err == nil:
		t.leads = leads
		t.note(want)
	}
	return true, err
}

// makes reports whether the chain is wanted and has to be made.
func makes(have *state, want *layout, chain string, flags nftables.TableFlags) bool {
	if want == nil {
		return false
	}
	i := slices.IndexFunc(want.chains, func(c *nftables.Chain) bool { return c.Name == chain })
	return i >= 0 && (have.table == nil || have.table.Flags != flags || !slices.ContainsFunc(have.chains, sameChain(want.chains[i])))
}

// holds reports whether nothing needs to change.
func (t *Tables) holds(have []*state, want []*layout) bool {
	for i, h := range have {
		switch l := layoutOf(want, tables[i]); {
		case l == nil && h.table != nil:
			return false
		case l != nil && (h.table == nil || h.table.Flags != t.flags || !h.holds(l)):
			return false
		}
	}
	return true
}

// tables are the families of our tables.
var tables = []nftables.TableFamily{nftables.TableFamilyINet, nftables.TableFamilyIPv4}

func layoutOf(all []*layout, family nftables.TableFamily) *layout {
	for _, l := range all {
		if l.table.Family == family {
			return l
		}
	}
	return nil
}

// KeepsMap reports whether Set(d) would keep the elements of the map of permissions: it makes a
// set anew that is declared otherwise, and so empties it.
func (t *Tables) KeepsMap(d Desired) (bool, error) {
	want, err := newLayouts(t.name, t.possible(d))
	if err != nil {
		return false, err
	}
	l := layoutOf(want, nftables.TableFamilyIPv4)
	if l == nil {
		return false, nil
	}
	have, err := t.read(t.owned(nftables.TableFamilyIPv4), l)
	if err != nil || have.table == nil || (have.table.Flags^t.flags)&^nftables.TableFlagOwner != 0 {
		return false, err
	}
	for _, s := range l.sets {
		if (s.Name == elements.PermissionMap || s.Name == elements.PortMap) && !slices.ContainsFunc(have.sets, sameSet(s.Set)) {
			return false, nil
		}
	}
	return true, nil
}

func (t *Tables) owned(family nftables.TableFamily) *nftables.Table {
	return &nftables.Table{Name: t.name, Family: family, Flags: t.flags}
}

// readAll reads both tables.
func (t *Tables) readAll(want []*layout) (have []*state, err error) {
	for _, family := range tables {
		s, err := t.read(t.owned(family), layoutOf(want, family))
		if err != nil {
			return nil, err
		}
		have = append(have, s)
	}
	return have, nil
}

// change adds to the batch the changes that turn have into want. want is nil if the table
// is not wanted. It reports whether there are any changes.
func (t *Tables) change(family nftables.TableFamily, have *state, want *layout) bool {
	table := t.owned(family)
	switch {
	case want == nil:
		if have.table != nil {
			t.w.DelTable(table)
		}
		return have.table != nil
	case have.table != nil && have.table.Flags != t.flags:
		t.w.DelTable(table) // the flag persist cannot be changed
		have = &state{}
	case have.holds(want):
		return false
	}
	t.w.make(table, have, want)
	return true
}

// make adds to the batch what makes the table hold exactly what is wanted.
func (w *writer) make(table *nftables.Table, have *state, want *layout) {
	w.AddTable(table)
	for _, name := range want.counters {
		w.AddObj(&nftables.NamedObj{Table: table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	w.FlushTable(table)
	for _, c := range have.chains {
		if !slices.ContainsFunc(want.chains, sameChain(c)) {
			w.DelChain(c)
		}
	}
	sets := want.kernelSets()
	for _, s := range have.sets {
		if !s.Anonymous && !slices.ContainsFunc(sets, sameSet(s)) { // an anonymous set goes with its rule
			w.DelSet(s)
		}
	}
	for name := range have.counters {
		if !slices.Contains(want.counters, name) {
			w.DeleteObject(&nftables.NamedObj{Table: table, Name: name, Type: nftables.ObjTypeCounter})
		}
	}
	for _, c := range want.chains {
		if !slices.ContainsFunc(have.chains, sameChain(c)) {
			w.AddChain(c)
		}
	}
	// Flush also returns the errors of these calls.
	for _, s := range want.sets {
		w.fill(s, have)
	}
	for _, r := range want.rules {
		w.AddRule(r)
	}
}

// fill adds to the batch what makes the set with the wanted elements. Elements that stay are left
// alone: if one is replaced by its like, a packet that looks it up at that moment may find neither.
// Intervals are replaced together, because they may overlap.
func (w *writer) fill(s *set, have *state) {
	exists := slices.ContainsFunc(have.sets, sameSet(s.Set))
	if !exists {
		_ = w.AddSet(s.Set, s.first)
	}
	if s.free || exists && have.hasElements(s) {
		return
	}
	add := s.elements
	switch {
	case !exists:
	case s.Interval:
		w.FlushSet(s.Set)
	default:
		var gone []nftables.SetElement
		add, gone = s.changes(have.elements[s.Name])
		_ = w.SetDeleteElements(s.Set, gone)
	}
	_ = w.SetAddElements(s.Set, add)
}

// Counters reads the counters. All are 0 if the tables do not exist.
func (t *Tables) Counters() (Counters, error) {
	n := Counters{}
	for _, family := range tables {
		s := state{counters: map[string]uint64{}}
		if err := s.readCounters(t.c, t.owned(family)); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, nfnl.Permitted(err)
		}
		for name, packets := range s.counters {
			n[name] += packets
		}
	}
	return n, nil
}

// Remove deletes the tables, if they exist, and with them all permissions of the map.
func (t *Tables) Remove() error {
	have, err := t.readAll(nil)
	if err != nil {
		return err
	}
	t.written = nil
	t.w.Lock()
	defer t.w.Unlock()
	changed := false
	for i, h := range have {
		changed = t.change(tables[i], h, nil) || changed
	}
	if !changed {
		return nil
	}
	return t.flush("delete")
}

// Close ends the connections. The tables stay as they are.
func (t *Tables) Close() error {
	var errs []error
	if t.c != nil {
		errs = append(errs, t.c.CloseLasting())
	}
	if t.w != nil {
		errs = append(errs, t.w.CloseLasting())
	}
	if t.look != nil {
		errs = append(errs, t.look.Close())
	}
	return errors.Join(errs...)
}

// flush sends the batch. The writer must be locked.
func (t *Tables) flush(verb string) error {
	if err := t.w.Flush(); err != nil {
		return fmt.Errorf("%s tables %s: %w", verb, t.name, nfnl.Permitted(err))
	}
	return nil
}

// title is how nft names a table.
func title(t *nftables.Table) string { return nfnl.FamilyName(byte(t.Family)) + " " + t.Name }
