package daemon

import (
	"cmp"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// Verify compares the model with the kernel: permissions with expectations and the map,
// flows and children with conntrack. It changes nothing. It looks twice and reports what
// is wrong both times, since the kernel's state changes meanwhile. A dump itself ends the
// flows that have timed out (ctnetlink_dump_table).
func (s source) Verify() (v control.Verification, err error) {
	if err := s.showAll(0); err != nil {
		return v, err
	}
	err = s.job(func(r *reconciler) error { // it alone lists the backends
		first, err := r.differences(&v)
		if err != nil {
			return err
		}
		if !r.catchUp() {
			return errEnded
		}
		again, err := r.differences(&v)
		if err != nil {
			return err
		}
		for w := range first {
			if _, still := again[w]; still {
				v.Wrong = append(v.Wrong, w)
			}
		}
		slices.SortFunc(v.Wrong, func(a, b control.Wrong) int {
			return cmp.Or(a.Ext.Compare(b.Ext), a.Peers.Compare(b.Peers), cmp.Compare(a.ID, b.ID))
		})
		return nil
	})
	return v, err
}

// A wrong is the identifier (docs/control.md) of something that is not as it should be.
type wrong string

const (
	notInKernel        wrong = "not_in_kernel"
	unknownExpectation wrong = "unknown_expectation"
	unknownElement     wrong = "unknown_element"
	flowsDiffer        wrong = "flows_differ"
	childrenDiffer     wrong = "children_differ"
)

// A claimed permission is a permission with the inside endpoint that claims it.
type claimed struct {
	cone.Key
	in cone.Endpoint
}

// counted are the numbers of flows and children in the model, minus those in
// conntrack.
type counted struct{ flows, children int }

// flowCounts are the numbers of each claim, and by how many bits the claims cover more peers than one.
type flowCounts struct {
	claims   map[claimed]counted
	hostBits map[uint8]struct{}
}

// subtract takes what conntrack has away from one permission, if there is such a one.
func (f *flowCounts) subtract(k claimed, n counted) {
	if have, ok := f.claims[k]; ok {
		f.claims[k] = counted{have.flows - n.flows, have.children - n.children}
	}
}

// subtractAll does that for all permissions that cover the peer: for it alone, or for a prefix.
func (f *flowCounts) subtractAll(k claimed, n counted) {
	for k.HostBits = range f.hostBits {
		x := k
		x.Peer = k.Peer.WithoutLow(k.HostBits)
		f.subtract(x, n)
	}
}

// differences compares once.
func (r *reconciler) differences(v *control.Verification) (map[control.Wrong]struct{}, error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	all := make(map[control.Wrong]struct{})
	note := func(w wrong, k cone.Key) {
		all[control.Wrong{ID: string(w), Peers: k.Peers(), Ext: k.Ext.Netip()}] = struct{}{}
	}
	*v = control.Verification{}
	flows := flowCounts{claims: make(map[claimed]counted), hostBits: make(map[uint8]struct{})}
	var cfg config.Config
	r.ask(func(l *loop) { cfg = l.cfg })
	found, err := r.comparer.Verify(func(c *cone.View) {
		v.Permissions++
		flows.claims[claimed{c.Key, c.Int}] = counted{c.Flows, c.Children}
		flows.hostBits[c.HostBits] = struct{}{}
	})
	if err != nil {
		return nil, err
	}
	v.Expectations, v.Elements = found.Expectations, found.Elements
	for i := range found.Missing {
		note(notInKernel, found.Missing[i].Key)
	}
	for i := range found.Unexpected {
		switch p := &found.Unexpected[i]; {
		case p.By == cone.ByExpectation:
			note(unknownExpectation, p.Key)
		case !r.firewall.learns(cfg): // otherwise it may have been learned, and expires by itself
			note(unknownElement, p.Key)
		}
	}

	groups, labels := cone.NewPrefixTable(cfg.PeerGroups), r.firewall.labels()
	err = q.Dump(func(f *cone.Flow) {
		v.Flows++
		if _, excluded := slices.BinarySearch(cfg.ExcludePeerPorts, f.ReplySrc.Port); !excluded {
			k := claimed{cone.Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr, Zone: f.ReplyZone}, f.Src}
			flows.subtractAll(k, counted{flows: 1})
			first, n := cone.Expand(groups, f.ReplySrc.Addr)
			for i := range n {
				if k.Peer = first.Plus(i); k.Peer != f.ReplySrc.Addr {
					flows.subtract(k, counted{flows: 1})
				}
			}
		}
		// A flow that a helper of the user's expected is no child of ours, nor is one of the
		// user's forwards, which has no label.
		if f.Status.Has(cone.StatusExpected) && cone.IsAnchor(f.MasterSrc, f.MasterDst) ||
			!f.Status.Has(cone.StatusExpected) && (f.Labelled || !labels) {
			flows.subtractAll(claimed{cone.Key{Ext: f.Dst, Peer: f.Src.Addr, Zone: f.ReplyZone}, f.ReplySrc}, counted{children: 1})
		}
	})
	if err != nil {
		return nil, err
	}
	for k, n := range flows.claims {
		if n.flows != 0 {
			note(flowsDiffer, k.Key)
		}
		if n.children != 0 {
			note(childrenDiffer, k.Key)
		}
	}
	return all, nil
}
