package gateway

import "slices"

// SharedDefaults returns the names of the outside links between which the kernel chooses for
// each flow, because a default route has several next hops (ECMP).
func (n Network) SharedDefaults() []string {
	return n.names(func(l Link) bool {
		return l.Outside != 0 && slices.ContainsFunc(n.Routes, func(r Route) bool {
			return r.Link == l.Index && r.Shared && isDefault(r.Prefix)
		})
	})
}
