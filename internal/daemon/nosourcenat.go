package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/userrules"
)

// neverTranslated returns the subnets that no rule of the user's translates on any outside link, for
// certain. Those that need no source NAT are not among them.
func (f *firewall) neverTranslated(cfg config.Config) (all []netip.Prefix) {
	// A rule may name a VRF in place of its links.
	if len(f.leaving4) == 0 || f.withVRF || f.unread != nil || f.user == nil || f.user.SourcesMayBeHidden() {
		return nil
	}
	if _, err := f.user.PortChoosers(); err != nil {
		return nil // a chain cannot be read
	}
	rules := f.user.SourceNAT()
	for _, s := range cfg.Subnets {
		translates := func(n userrules.SourceNAT) bool {
			return slices.ContainsFunc(f.leaving4, n.LeavesBy) && len(n.Within([]netip.Prefix{s.Prefix})) > 0
		}
		if translated(s) && !slices.ContainsFunc(rules, translates) {
			all = append(all, s.Prefix)
		}
	}
	return all
}
