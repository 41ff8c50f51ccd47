package daemon

import (
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
)

// A router finds the links by which flows leave. It opens its connection on first
// use.
type router struct {
	network gateway.Network
	marked  func() bool // whether rules may mark packets before they are routed
	kernel  *gateway.Router
	byIndex map[int]gateway.Link
	err     error // the first error
}

// router returns one for the packets of inside hosts, by the rules that were last read.
func (f *firewall) router(cfg config.Config, network gateway.Network) *router {
	return &router{network: network, marked: func() bool {
		return cfg.UplinkMarks || f.user == nil || f.unread != nil || f.user.MayMark()
	}}
}

// links returns the links by which the packets of the flow's opener may leave; none if
// they do not leave, or if that is unknown. all is false if some may not leave at all.
func (r *router) links(f *cone.Flow) (links []gateway.Link, all bool) {
	if r.kernel == nil && r.err == nil {
		r.kernel, r.err = gateway.DialRouter(0, r.network, r.marked)
		r.byIndex = make(map[int]gateway.Link)
		for _, l := range r.network.Links {
			r.byIndex[l.Index] = l
		}
	}
	if r.err != nil {
		return nil, false
	}
	var indexes []int
	if indexes, all, r.err = r.kernel.Links(f.Src, f.ReplySrc); r.err != nil {
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
