package daemon

import (
	"errors"
	"net/netip"
	"slices"
	"testing"
)

// Fails when rules that cannot be read count as rules that choose no ports: hosts would be
// moved to ports that the provider drops.
func TestRulesThatCannotBeReadMayChooseAllPorts(t *testing.T) {
	f := &firewall{unread: errors.New("not permitted")}
	choosers, err := f.readChoosers()
	if !errors.Is(err, f.unread) {
		t.Error(err)
	}
	subnets := []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24"), netip.MustParsePrefix("10.47.12.0/24")}
	chosen := chosenPorts(choosers, subnets, []string{"wan0", "wan1"})
	if !slices.Equal(chosen["wan0"], subnets) || !slices.Equal(chosen["wan1"], subnets) {
		t.Errorf("they choose for %v", chosen)
	}
}
