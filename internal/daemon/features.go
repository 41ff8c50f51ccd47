package daemon

import (
	"github.com/conenatd/conenatd/internal/rules"
)

// features are what the kernel offers to our tables. They stay as openFirewall found them, so
// the loop has a copy.
type features struct {
	nftables bool
	lacks    map[rules.Feature]error // why, for those that matter; all that matter without nftables
	warnings warnings                // that stay as long as the daemon runs
}

// noFeatures are those of a kernel without nftables.
func noFeatures(missing error) (f features) {
	f.lacks = map[rules.Feature]error{
		rules.FeatureMap: missing, rules.FeatureMapping: missing, rules.FeatureUplinkMarks: missing, rules.FeatureQuiet: missing,
	}
	f.warnings.add(warnNoNFTables, "", "no guard and no cap on children, and what is revoked comes back at a restart: %v", missing)
	return f
}

// featuresOf returns what t has.
func featuresOf(t *rules.Tables) features {
	f := features{nftables: true, lacks: make(map[rules.Feature]error)}
	for _, m := range t.Missing() {
		f.lacks[m.Feature] = m
		switch m.Feature {
		case rules.FeatureMap, rules.FeatureMapping, rules.FeaturePartial, rules.FeatureUplinkMarks, rules.FeatureQuiet:
			// The code that needs them warns.
		default:
			f.warnings.add(warnFeatureMissing, string(m.Feature), "%v", m)
		}
	}
	return f
}

// has reports whether the tables have a feature.
func (f *features) has(x rules.Feature) bool { return f.nftables && f.lacks[x] == nil }

// labels reports whether the kernel marks what the map admits.
func (f *features) labels() bool { return f.has(rules.FeatureLabels) }

// maps reports whether the kernel can do endpoint-independent mapping.
func (f *features) maps() bool { return f.has(rules.FeatureMapping) }

// knowsOwn reports whether the tables can recognise an address of the gateway.
func (f *features) knowsOwn() bool { return f.has(rules.FeatureSpoofed) }

// noMap says why there can be no map of permissions; it is nil if there can.
func (f *features) noMap() error { return f.lacks[rules.FeatureMap] }
