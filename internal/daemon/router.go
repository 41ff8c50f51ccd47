package daemon

import (
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A router finds the links by which flows leave. It opens its connection on first
// use.
type router struct {
	network gateway.Network
	marker  *userrules.Marker // nil if it is not known how packets are marked
	kernel  *gateway.Router
	byIndex map[int]gateway.Link
	err     error // the first error
}

// router returns one for the packets of inside hosts, by the rules that were last read. With
// uplink_marks our own rules set marks, too.
func (f *firewall) router(cfg config.Config, network gateway.Network) *router {
	r := &router{network: network}
	if !cfg.UplinkMarks && f.user != nil && f.unread == nil {
		r.marker = f.markerOf(f.user)
	}
	return r
}

// markerOf returns the Marker of rules.
func (f *firewall) markerOf(rs *userrules.Ruleset) *userrules.Marker {
	if f.marker == nil || f.marked != rs {
		f.marker, f.marked = rs.Marker(), rs
	}
	return f.marker
}

// links returns the links by which the packets of the flow's source may leave; none if
// they do not leave, or if that is unknown. all is false if some may not leave at all. A child is
// turned.
func (r *router) links(f *cone.Flow) (links []gateway.Link, all bool) {
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
func (r *router) marking(f *cone.Flow) gateway.Marking {
	return func(link int, arriving []uint32) ([]uint32, bool) {
		l, ok := r.byIndex[link]
		if r.marker == nil || !ok || !f.Src.Addr.Is4() {
			return nil, false
		}
		return r.marker.Marks(f, linkOf(l), arriving)
	}
}

// close ends the connection, and returns the first error since it was opened.
func (r *router) close() error {
	err := r.err
	if r.kernel != nil {
		_ = r.kernel.Close()
		r.kernel = nil
	}
	r.err = nil
	return err
}
