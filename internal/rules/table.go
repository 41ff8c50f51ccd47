//go:build !(386 || arm || mips || mipsle)

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
)

// A Table is our table in one network namespace. It is not safe for concurrent
// use.
//
// Where the kernel has both flags (Linux 6.9), the table is owned by the
// connection and persists: nobody else can change it, "nft flush ruleset"
// passes it by, and it outlives the process, so that the next one can take it
// over. The flag owner alone would end it with the process.
type Table struct {
	c       *conn
	table   *nftables.Table
	port    uint32 // of c, by which the kernel knows an owner
	missing []*UnsupportedError
}

// Open finds out by trying what the kernel offers. It changes nothing. The
// error is an *UnsupportedError where there is no nftables, and wraps
// ErrForeignTable or ErrOwned where the table is not for us.
func Open(cfg Config) (*Table, error) {
	c, err := dial(cfg.NetNS)
	if err != nil {
		return nil, err
	}
	t := &Table{c: c, table: &nftables.Table{
		Name:   cmp.Or(cfg.Name, DefaultName),
		Family: nftables.TableFamilyINet,
	}}
	t.port, err = c.GetPortID()
	if err == nil {
		err = t.probe()
	}
	if err == nil {
		_, err = t.read()
	}
	if err != nil {
		return nil, errors.Join(err, t.Close())
	}
	return t, nil
}

// Missing returns the features that the kernel lacks. Set leaves them out.
func (t *Table) Missing() []*UnsupportedError { return t.missing }

// Set makes the table do what d wants, in one transaction, but for what Missing
// names, and makes us its owner. Where it does so already, nothing is changed; where somebody has
// changed it, it is repaired. Counters go on, and so do the counts of children
// unless the cap is another one.
func (t *Table) Set(d Desired) error {
	for _, m := range t.missing {
		switch m.Feature {
		case FeatureGuard:
			d.Guard = false
		case FeatureMaxChildren:
			d.MaxChildren = 0
		}
	}
	want, err := newLayout(t.table, d)
	if err != nil {
		return err
	}
	have, err := t.read()
	if err != nil {
		return err
	}
	if have.table != nil && have.table.Flags == t.table.Flags&^nftables.TableFlagOwner {
		// The kernel wants a transaction of its own for a new owner.
		t.c.AddTable(t.table)
		if err := t.flush("take over"); err != nil {
			return err
		}
		have.table.Flags = t.table.Flags
	}
	if have.holds(want) && have.table.Flags == t.table.Flags {
		return nil
	}
	t.change(have, want)
	err = t.flush("set")
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w (somebody changed it meanwhile)", err)
	}
	return err
}

// change puts into the batch what turns have into want.
func (t *Table) change(have *state, want *layout) {
	if have.table != nil && have.table.Flags != t.table.Flags {
		t.c.DelTable(t.table) // the flag persist cannot be changed
		have = &state{}
	}
	t.c.AddTable(t.table)
	for _, name := range counters {
		t.c.AddObj(&nftables.NamedObj{
			Table: t.table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{},
		})
	}
	t.c.FlushTable(t.table)
	for _, c := range have.chains {
		if !slices.ContainsFunc(want.chains, sameChain(c)) {
			t.c.DelChain(c)
		}
	}
	for _, s := range have.sets {
		if !slices.ContainsFunc(want.sets, sameSet(s)) {
			t.c.DelSet(s)
		}
	}
	for _, c := range want.chains {
		if !slices.ContainsFunc(have.chains, sameChain(c)) {
			t.c.AddChain(c)
		}
	}
	for _, s := range want.sets {
		if !slices.ContainsFunc(have.sets, sameSet(s)) {
			_ = t.c.AddSet(s, nil) // Flush returns the error too
		}
	}
	outside := &nftables.Set{Table: t.table, Name: outsideSet}
	t.c.FlushSet(outside)
	_ = t.c.SetAddElements(outside, elements(want.outside))
	for _, r := range want.rules {
		t.c.AddRule(r)
	}
}

// Counters reads the counters. All are 0 while the table is not there.
func (t *Table) Counters() (Counters, error) {
	have, err := t.read()
	if err != nil || have.table == nil {
		return Counters{}, err
	}
	return Counters{
		GuardDrops:    have.counters[guardCounter],
		ChildDrops:    have.counters[childCounter],
		PortZeroDrops: have.counters[zeroCounter],
	}, nil
}

// Remove deletes the table, if it is there.
func (t *Table) Remove() error {
	have, err := t.read()
	if err != nil || have.table == nil {
		return err
	}
	t.c.DelTable(t.table)
	return t.flush("delete")
}

// Close ends the connection. The table stays as it is.
func (t *Table) Close() error { return t.c.CloseLasting() }

func (t *Table) flush(verb string) error {
	err := t.c.begin()
	if err == nil {
		err = t.c.Flush()
	}
	if err != nil {
		return fmt.Errorf("%s table inet %s: %w", verb, t.table.Name, nfnl.Permitted(err))
	}
	return nil
}
