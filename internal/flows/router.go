package flows

import (
	"errors"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A Router finds the links by which flows leave. It opens its connections on first use.
type Router struct {
	network gateway.Network
	marker  *userrules.Marker
	members userrules.Members
	kernel  *gateway.Router
	byIndex map[int]gateway.Link
	err     error // the first error
}

// NewRouter returns a Router for packets that marker marks. A nil marker says that it is not known
// how packets are marked.
func NewRouter(network gateway.Network, marker *userrules.Marker) *Router {
	return &Router{network: network, marker: marker}
}

// Links returns the links by which the packets of the flow's source may leave; none if
// they do not leave, or if that is unknown. all is false if some may not leave at all. A child is
// turned.
func (r *Router) Links(f *cone.Flow) (links []gateway.Link, all bool) {
	if r.network.HidesWays(gateway.FamilyOf(f.Src.Addr.Netip())) {
		return nil, false
	}
	if r.kernel == nil && r.err == nil {
		r.kernel, r.err = gateway.DialRouter(0, r.network)
		r.byIndex = make(map[int]gateway.Link)
		for _, l := range r.network.Links {
			r.byIndex[l.Index] = l
		}
	}
	if r.err != nil {
		return nil, false
	}
	var indexes []int
	if indexes, all, r.err = r.kernel.Links(f.Src, f.ReplySrc, r.marking(f)); r.err != nil {
		return nil, false
	}
	for _, i := range indexes {
		l, ok := r.byIndex[i]
		if !ok {
			return nil, false // a link newer than network
		}
		links = append(links, l)
	}
	return links, all
}

// marking returns how rules mark packets of the flow's source.
func (r *Router) marking(f *cone.Flow) gateway.Marking {
	return func(link int, arriving []uint32) ([]uint32, bool) {
		l, ok := r.byIndex[link]
		if r.marker == nil || !ok || !f.Src.Addr.Is4() {
			return nil, false
		}
		return r.marker.Marks(f, LinkOf(l), arriving, &r.members)
	}
}

// Close ends the connections, and returns the first errors since they were opened.
func (r *Router) Close() error {
	err := errors.Join(r.err, r.members.Close())
	if r.kernel != nil {
		_ = r.kernel.Close()
		r.kernel = nil
	}
	r.err = nil
	return err
}

// LinkOf returns a link as rules name it.
func LinkOf(l gateway.Link) userrules.Link { return userrules.Link{Index: l.Index, Name: l.Name} }
