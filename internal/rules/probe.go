package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// features are the parts that a kernel may lack, each with tables that need it.
var features = []struct {
	UnsupportedError
	try Desired
}{
	{UnsupportedError{
		Feature: FeatureTable,
		Fix:     "load the module nf_tables (CONFIG_NF_TABLES_INET; OpenWrt: kmod-nft-core)",
	}, Desired{Subnets: tryBoth, Helpers: tryHelpers, noWayBack: true}},
	{UnsupportedError{
		Feature: FeatureGuard,
		Fix:     "load the module nft_socket (CONFIG_NFT_SOCKET, Linux 5.10; OpenWrt: kmod-nft-socket)",
	}, Desired{Subnets: tryBoth, Guard: true}},
	{UnsupportedError{
		Feature: FeatureSpoofed,
		Fix:     "load the module nft_fib_inet (CONFIG_NFT_FIB_INET; OpenWrt: kmod-nft-fib), or set net.ipv4.conf.all.rp_filter = 1",
	}, Desired{Subnets: tryBoth, Spoofed: true, noIPsec: true}},
	{UnsupportedError{
		Feature: FeatureWayBack,
		Fix: "load the modules nft_chain_nat and nft_fib_inet (CONFIG_NFT_NAT, CONFIG_NFT_FIB_INET; OpenWrt: kmod-nft-nat, " +
			"kmod-nft-fib), or set net.ipv4.conf.all.rp_filter = 1",
	}, Desired{Subnets: tryBoth, Helpers: tryHelpers, noIPsec: true}},
	{UnsupportedError{
		Feature: FeaturePartial,
		Fix:     "load the module nft_fib_inet (CONFIG_NFT_FIB_INET), on Linux 5.18 or later",
	}, Desired{Subnets: tryBoth, Helpers: tryHelpers, OutsideLinks: []string{"probe"}, Partial: []string{"probe"}, noWayBack: true}},
	{UnsupportedError{
		Feature: FeatureMaxChildren,
		Fix:     "load the module nft_connlimit (CONFIG_NFT_CONNLIMIT; OpenWrt: kmod-nft-connlimit)",
	}, Desired{Subnets: tryBoth, Helpers: tryHelpers, MaxChildren: 1, noWayBack: true}},
	{UnsupportedError{
		Feature: FeatureMap,
		Fix: "load the modules nft_chain_nat, nft_nat and nft_socket " +
			"(CONFIG_NFT_NAT, CONFIG_NFT_SOCKET, CONFIG_NF_CONNTRACK_ZONES; OpenWrt: kmod-nft-nat, kmod-nft-socket)",
	}, Desired{Map: &MapConfig{Size: 1, noLabels: true}, noFib: true}},
	{UnsupportedError{
		Feature: FeatureLabels,
		Fix: "load the module nf_conntrack built with CONFIG_NF_CONNTRACK_LABELS (OpenWrt: kmod-ipt-conntrack-label); " +
			"without, unanswered children of the map outlive a daemon that dies",
	}, Desired{Map: &MapConfig{Size: 1}, noFib: true}},
	{UnsupportedError{
		Feature: FeatureLearn,
		Fix:     "load the module nft_limit (CONFIG_NFT_LIMIT)",
	}, Desired{Map: &tryLearning, noFib: true}},
	{UnsupportedError{
		Feature: FeatureMapping,
		Fix: "load the modules nft_chain_nat, nft_nat and nft_socket " +
			"(CONFIG_NFT_NAT, CONFIG_NFT_SOCKET, CONFIG_NF_CONNTRACK_ZONES; OpenWrt: kmod-nft-nat, kmod-nft-socket)",
	}, Desired{Mapping: &tryMapping, noFib: true}},
	{UnsupportedError{
		Feature: FeatureUplinkMarks,
		Fix:     "load the module nf_conntrack built with CONFIG_NF_CONNTRACK_MARK",
	}, Desired{Subnets: tryBoth, UplinkMarks: &UplinkMarks{Mask: 1, Links: []string{"probe0"}}}},
	{UnsupportedError{
		Feature: FeatureQuiet,
		Fix:     "load the module nft_chain_nat (CONFIG_NFT_NAT, CONFIG_NF_CONNTRACK_EVENTS; OpenWrt: kmod-nft-nat)",
	}, Desired{Quiet: true, ExcludePeerPorts: []uint16{53}}},
}

// tryLearning uses all that learning needs. Without ct count the buckets alone limit children.
var tryLearning = MapConfig{Size: 1, MaxChildren: 1, Learn: true, LearnRate: 1, Lifetime: time.Second, noLabels: true, noNumgen: true, noCount: true}

// tryMapping uses all that mappings need, except the test for IPsec policies, which a
// kernel without IPsec lacks (CONFIG_XFRM).
var tryMapping = MappingConfig{
	Pools: []Pool{{tryPrefixes, cone.PortRanges{{First: 1024, Last: 2047}}}}, Lifetime: time.Second, Size: 1,
	Subnets: tryPrefixes, Hairpin: tryPrefixes, noIPsec: true,
}

var (
	tryPrefixes = []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")}
	tryBoth     = append([]netip.Prefix{netip.MustParsePrefix("2001:db8::/64")}, tryPrefixes...)
	tryHelpers  = []string{"probe"}
)

// probe finds out what the kernel offers.
func (t *Tables) probe() error {
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
	withIPsec := tryMapping
	withIPsec.noIPsec = false
	t.noSecPath = t.try(0, Desired{Subnets: tryPrefixes, Spoofed: true}) != nil
	withCount := tryLearning
	withCount.noCount = false
	t.noCount = t.try(0, Desired{Map: &withCount}) != nil
	withNumgen := tryLearning
	withNumgen.noNumgen = false
	t.noNumgen = t.try(0, Desired{Map: &withNumgen, noFib: true}) != nil
	t.noIPsec = t.try(0, Desired{Mapping: &withIPsec, noFib: true}) != nil
	if t.try(both, Desired{}) == nil {
		t.flags = both
	}
	return nil
}

// try sends a transaction that makes the tables for d and ends with an impossible request:
// the kernel checks the transaction, loads modules, and changes nothing.
func (t *Tables) try(flags nftables.TableFlags, d Desired) error {
	ls, err := t.tried(d)
	if err != nil {
		return err
	}
	return t.tryLayouts(flags, ls)
}

// tried returns the tables to try. Without outside links most rules would be left out; two
// links exercise the set lookup.
func (t *Tables) tried(d Desired) ([]*layout, error) {
	d.OutsideLinks = []string{"probe0", "probe1"}
	return newLayouts(t.name+"_probe", d)
}

func (t *Tables) tryLayouts(flags nftables.TableFlags, ls []*layout) error {
	for _, l := range ls {
		l.table.Flags = flags
		t.w.make(l.table, &state{}, l)
	}
	t.w.CreateTable(ls[0].table) // fails, because the table exists already
	err := t.flush("try")
	if errors.Is(err, unix.EEXIST) {
		return nil
	}
	return err
}

// listError wraps an error from listing nftables objects. It returns an *UnsupportedError
// if the kernel has no nftables.
func listError(what string, err error) error {
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		missing := features[0].UnsupportedError
		missing.Err = err
		return &missing
	case err != nil:
		return fmt.Errorf("list nftables %s: %w", what, err)
	}
	return nil
}
