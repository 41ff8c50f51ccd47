package daemon

import (
	"fmt"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// Verify compares what the daemon takes for true with what the kernel holds:
// permissions with expectations and the map, flows and children with conntrack. It
// changes nothing. It looks twice and tells what is wrong both times, for the kernel
// goes on meanwhile.
func (s source) Verify() (v control.Verification, err error) {
	d := s.Daemon
	done := make(chan struct{})
	look := func() {
		defer close(done)
		var first, again map[string]struct{}
		if first, err = d.differences(&v); err != nil {
			return
		}
		if again, err = d.differences(&v); err != nil {
			return
		}
		for w := range first {
			if _, still := again[w]; still {
				v.Wrong = append(v.Wrong, w)
			}
		}
		slices.Sort(v.Wrong)
	}
	select {
	case d.jobs <- look: // of the reconcile, as the lists of the backends are
		<-done
		return v, err
	case <-d.ended:
		return v, errEnded
	}
}

// A claimed permission is one inside endpoint's.
type claimed struct {
	cone.Key
	in cone.Endpoint
}

// counted are flows and children, as the model has them less those that conntrack
// shows.
type counted struct{ flows, children int }

// differences looks once.
func (d *Daemon) differences(v *control.Verification) (map[string]struct{}, error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	began := d.now()
	found, err := d.backends.list(true)
	if err != nil {
		return nil, fmt.Errorf("list permissions: %w", err)
	}
	wrong := make(map[string]struct{})
	note := func(format string, args ...any) { wrong[fmt.Sprintf(format, args...)] = struct{}{} }
	*v = control.Verification{Expectations: len(found.expect), Elements: len(found.nft)}

	flows := make(map[claimed]counted)
	wild := make(map[uint8]struct{})
	var cfg config.Config
	d.do(func() { cfg = d.cfg.Config })
	d.walk(func(c cone.View) {
		if c.State != cone.StateStanding {
			return
		}
		v.Permissions++
		flows[claimed{c.Key, c.Int}] = counted{c.Flows, c.Children}
		wild[c.Wild] = struct{}{}
		if c.Since < began && !d.backends.whole(&c.Permission, found) {
			note("%v -> %v stands, but not in the kernel", c.Peers(), c.Ext)
		}
		delete(found.expect, c.Key)
		delete(found.nft, c.Key)
	})
	for k := range found.expect {
		note("%v -> %v is expected by the kernel, but does not stand", k.Peers(), k.Ext)
	}
	for k := range found.nft {
		// What the kernel learned and no event told of runs out by itself.
		if !d.firewall.learns(cfg) {
			note("%v -> %v is in the map, but does not stand", k.Peers(), k.Ext)
		}
	}

	count := func(ext, peer, in cone.Endpoint, zone uint16, n counted) {
		for w := range wild {
			k := claimed{cone.Key{Ext: ext, Peer: peer.Addr.WithoutLow(w), Zone: zone, Wild: w}, in}
			if have, ok := flows[k]; ok {
				flows[k] = counted{have.flows - n.flows, have.children - n.children}
			}
		}
	}
	err = q.Dump(func(f *cone.Flow) {
		v.Flows++
		if !slices.Contains(cfg.ExcludePeerPorts, f.ReplySrc.Port) {
			count(f.ReplyDst, f.ReplySrc, f.Src, f.ReplyZone, counted{flows: 1})
		}
		count(f.Dst, f.Src, f.ReplySrc, f.OrigZone, counted{children: 1})
	})
	if err != nil {
		return nil, err
	}
	for k, n := range flows {
		if n.flows != 0 {
			note("%v -> %v has not the flows that conntrack shows", k.Peers(), k.Ext)
		}
		if n.children != 0 {
			note("%v -> %v has not the children that conntrack shows", k.Peers(), k.Ext)
		}
	}
	return wrong, nil
}
