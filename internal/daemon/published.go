package daemon

import (
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
)

// mostPublished bounds the destinations that forwards publish, and a range of them in addresses: a
// rule for all but some destinations publishes nothing.
const mostPublished = 1 << 10

// publish finds the destinations that rules of the user's lead on and that are not the gateway's,
// and reports whether they have changed. forwards must have been called.
func (f *firewall) publish(network gateway.Network) (changed bool) {
	own := network.Topology().Local
	published := slices.DeleteFunc(slices.Clone(f.destinations), func(r cone.AddrRange) bool {
		return r.First == r.Last && slices.Contains(own, r.First) || !r.Few(mostPublished)
	})
	published = published[:min(len(published), mostPublished)]
	changed = !slices.Equal(published, f.published)
	f.published = published
	return changed
}
