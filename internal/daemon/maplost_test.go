package daemon

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// The forward chain accepts RELATED alone.
//
// Fails when auto is advised where it would not help, and when a subnet without permissions
// gets a warning.
func TestAutoIsAdvisedWhereItHelps(t *testing.T) {
	small, large := netip.MustParsePrefix("203.0.113.0/28"), netip.MustParsePrefix("203.0.113.0/27")
	const drops, auto = "your firewall drops", `backend = "auto"`
	for name, tc := range map[string]struct {
		backend   config.Backend
		helper    bool
		filtering config.Filtering
		group     netip.Prefix
		want      []string // what the warning has of both
	}{
		"nft":                          {config.BackendNFT, false, config.AddressDependent, netip.Prefix{}, []string{drops, auto}},
		"nft, a small group":           {config.BackendNFT, false, config.AddressDependent, small, []string{drops, auto}},
		"nft, a large group":           {config.BackendNFT, false, config.AddressDependent, large, []string{drops}},
		"nft, open":                    {config.BackendNFT, false, config.EndpointIndependent, netip.Prefix{}, []string{drops}},
		"auto, open":                   {config.BackendAuto, true, config.EndpointIndependent, netip.Prefix{}, []string{drops}},
		"auto, and no helper":          {config.BackendAuto, false, config.AddressDependent, netip.Prefix{}, []string{drops}},
		"auto":                         {config.BackendAuto, true, config.AddressDependent, netip.Prefix{}, nil},
		"nft, but without permissions": {config.BackendNFT, false, config.AddressAndPortDependent, netip.Prefix{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := &firewall{withMap: true}
			if tc.helper {
				f.helpers = []string{"RAS"}
			}
			cfg := config.Config{Backend: tc.backend}
			if tc.group.IsValid() {
				cfg.PeerGroups = []netip.Prefix{tc.group}
			}
			d := choose(userrules.ChildVerdicts{MostDNATed: userrules.Dropped, MostRelated: userrules.Accepted, DNATedBy: userrules.Dropper{Chain: "inet f forward"}})
			if tc.filtering == config.EndpointIndependent {
				d.Choice = cone.ChooseMap
			}
			text, _ := f.warning(cfg, config.Subnet{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Filtering: tc.filtering}, d)
			var got []string
			for _, part := range []string{drops, auto} {
				if strings.Contains(text, part) {
					got = append(got, part)
				}
			}
			if strings.Join(got, ", ") != strings.Join(tc.want, ", ") {
				t.Errorf("%q", text)
			}
		})
	}
}

// Fails when the advice leaves out the label that doctor's line matches, and when it names one
// that no child has.
func TestAdviceNamesTheLabelOfTheMap(t *testing.T) {
	unlabelled := map[rules.Feature]error{rules.FeatureLabels: errors.New("no ct label")}
	for name, tc := range map[string]struct {
		firewall firewall
		at       userrules.Place
		want     bool
	}{
		"map":               {firewall{features: features{nftables: true}, withMap: true}, userrules.BehindNAT, true},
		"map, old kernel":   {firewall{features: features{nftables: true, lacks: unlabelled}, withMap: true}, userrules.BehindNAT, false},
		"expectations only": {firewall{features: features{nftables: true}}, userrules.BehindNAT, false},
		"before NAT":        {firewall{features: features{nftables: true}, withMap: true}, userrules.BeforeNAT, false},
	} {
		dropper := userrules.Dropper{Chain: "inet f forward", At: tc.at}
		d := choose(userrules.ChildVerdicts{MostDNATed: userrules.Dropped, MostRelated: userrules.Dropped, DNATedBy: dropper, RelatedBy: dropper})
		d.labelled = tc.firewall.labelsChildren()
		if text, _ := tc.firewall.warning(config.Config{}, config.Subnet{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Filtering: config.AddressDependent}, d); text == "" || strings.Contains(text, "ct label 126") != tc.want {
			t.Errorf("%s: %q", name, text)
		}
	}
}
