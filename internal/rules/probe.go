//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// features are the parts that a kernel may lack, each with something to try.
var features = []struct {
	UnsupportedError
	try Desired
}{
	{UnsupportedError{
		Feature: FeatureTable,
		Mend:    "load the module nf_tables (CONFIG_NF_TABLES_INET; OpenWrt: kmod-nft-core)",
	}, Desired{}},
	{UnsupportedError{
		Feature: FeatureGuard,
		Mend:    "load the module nft_socket (CONFIG_NFT_SOCKET, Linux 5.10; OpenWrt: kmod-nft-socket)",
	}, Desired{Guard: true}},
	{UnsupportedError{
		Feature: FeatureMaxChildren,
		Mend:    "load the module nft_connlimit (CONFIG_NFT_CONNLIMIT; OpenWrt: kmod-nft-connlimit)",
	}, Desired{MaxChildren: 1}},
}

// probe finds out what the kernel offers.
func (t *Table) probe() error {
	const both = nftables.TableFlagOwner | nftables.TableFlagPersist
	for _, f := range features {
		err := t.try(0, f.try)
		switch {
		case err == nil:
		case errors.Is(err, unix.EPERM):
			return fmt.Errorf("probe nftables: %w", nfnl.Permitted(err))
		case f.Feature == FeatureTable:
			f.Err = err
			return &f.UnsupportedError
		default:
			f.Err = err
			t.missing = append(t.missing, &f.UnsupportedError)
		}
	}
	if t.try(both, Desired{}) == nil {
		t.table.Flags = both
	}
	return nil
}

// try sends a transaction that would make a table do what d wants, and ends in
// what cannot be: so the kernel checks it, loads modules, and changes nothing.
func (t *Table) try(flags nftables.TableFlags, d Desired) error {
	table := &nftables.Table{Name: t.table.Name + "_probe", Family: t.table.Family, Flags: flags}
	l, err := newLayout(table, d)
	if err != nil {
		return err
	}
	return t.tryLayout(table, l)
}

func (t *Table) tryLayout(table *nftables.Table, l *layout) error {
	probe := Table{c: t.c, table: table}
	probe.change(&state{}, l)
	t.c.CreateTable(table) // there already
	err := probe.flush("try")
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}
