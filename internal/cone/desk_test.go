package cone

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// A desk is a Model under test with a kernel that grants everything.
type desk struct {
	t   *testing.T
	m   *Model
	id  uint32
	up  map[Key]Endpoint // what stands in the kernel
	by  map[Key]Carriers // what carries it
	ops []Op             // all that were carried out
}

func newDesk(t *testing.T, change func(*Policy)) *desk {
	p := testPolicy
	if change != nil {
		change(&p)
	}
	d := &desk{t: t, m: New(p), up: map[Key]Endpoint{}, by: map[Key]Carriers{}}
	d.m.SetTopology(0, testTopology)
	d.m.SetForwards(0, nil, false)
	d.m.BeginSnapshot(0)
	d.m.EndSnapshot(0)
	return d
}

// carry carries the ops out and returns their kinds.
func (d *desk) carry() (kinds []OpKind) {
	for ops := d.m.Ops(); len(ops) > 0; ops = d.m.Ops() {
		for _, o := range ops {
			kinds = append(kinds, o.Kind)
			d.ops = append(d.ops, o)
			switch o.Kind {
			case Grant:
				d.up[o.Key] = o.Int
				d.by[o.Key] |= o.By
				d.m.Granted(o.Permission)
			case Revoke:
				if d.by[o.Key] &^= o.By; d.by[o.Key] == 0 {
					delete(d.up, o.Key)
				}
			}
		}
	}
	return kinds
}

// open lets in send to peer and returns the flow.
func (d *desk) open(now time.Duration, in, peer string) *Flow {
	f := d.translated(in, peer)
	d.m.FlowSeen(now, f)
	d.carry()
	return f
}

// translated returns a new flow of in to peer, which keeps its port, and which the model
// has not seen.
func (d *desk) translated(in, peer string) *Flow {
	d.id++
	return &Flow{
		ID: d.id, Status: StatusSrcNAT, Src: ep(in), Dst: ep(peer), ReplySrc: ep(peer),
		ReplyDst: Endpoint{ep("198.51.100.1:1").Addr, ep(in).Port},
	}
}

// counted is translated, for a flow of which the kernel counted one packet, and which it
// would keep for left.
func (d *desk) counted(in, peer string, left time.Duration) *Flow {
	f := d.translated(in, peer)
	f.OrigPackets, f.HasCounters, f.Left = 1, true, left
	return f
}

func (d *desk) gone(now time.Duration, f *Flow) []OpKind {
	d.m.FlowGone(now, f)
	return d.carry()
}

// child opens a child of the permission that f earned.
func (d *desk) child(now time.Duration, f *Flow, port uint16) (kinds []OpKind) {
	d.id++
	from := Endpoint{f.ReplySrc.Addr, port}
	d.m.FlowSeen(now, &Flow{
		ID: d.id, Status: StatusExpected | StatusDstNAT,
		Src: from, Dst: f.ReplyDst, ReplySrc: f.Src, ReplyDst: from,
		MasterSrc: Endpoint{Addr: f.Src.Addr}, MasterDst: Endpoint{f.ReplySrc.Addr, f.ReplyDst.Port},
	})
	return d.carry()
}

// want checks which inside endpoints have a permission.
func (d *desk) want(ins ...string) {
	d.t.Helper()
	var got []string
	for _, in := range d.up {
		got = append(got, in.String())
	}
	slices.Sort(got)
	slices.Sort(ins)
	if !slices.Equal(got, ins) {
		d.t.Errorf("permissions stand for %q, want %q", got, ins)
	}
	if n := d.m.Stats().Standing; n != len(ins) {
		d.t.Errorf("Stats.Standing is %d, want %d", n, len(ins))
	}
}

func mapped(p *Policy) { p.Mapped = true }

// both has each permission carried by both.
func both(p *Policy) { choose(ChooseBoth)(p) }

func choose(c Choice) func(*Policy) {
	return func(p *Policy) {
		p.Mapped = true
		p.Subnets = slices.Clone(p.Subnets)
		for i := range p.Subnets {
			p.Subnets[i].Choice = c
		}
	}
}

// admit makes from send a packet to ext that the map leads to in.
func (d *desk) admit(now time.Duration, from, ext, in string, more Status) (*Flow, []OpKind) {
	return d.inbound(now, Flow{
		Status: StatusDstNAT | more, Labelled: d.m.policy.Labels,
		Src: ep(from), Dst: ep(ext), ReplySrc: ep(in), ReplyDst: ep(from),
	})
}

// dnat is admit with a forward of the user's in place of the map.
func (d *desk) dnat(now time.Duration, from, ext, in string, more Status) (*Flow, []OpKind) {
	return d.inbound(now, Flow{
		Status: StatusDstNAT | more,
		Src:    ep(from), Dst: ep(ext), ReplySrc: ep(in), ReplyDst: ep(from),
	})
}

func (d *desk) inbound(now time.Duration, f Flow) (*Flow, []OpKind) {
	d.id++
	f.ID = d.id
	d.m.FlowSeen(now, &f)
	return &f, d.carry()
}

func (d *desk) seen(now time.Duration, f *Flow) []OpKind {
	d.m.FlowSeen(now, f)
	return d.carry()
}

func (d *desk) snapshot(now time.Duration, flows ...*Flow) []OpKind {
	d.m.BeginSnapshot(now)
	for _, f := range flows {
		d.m.SnapshotFlow(now, f)
	}
	d.m.EndSnapshot(now)
	return d.carry()
}

// view returns the only claim of in.
func (d *desk) view(in string) (v View) {
	d.t.Helper()
	n := 0
	d.m.Walk(0, 1000, func(w View) {
		if w.Int == ep(in) {
			v = w
			n++
		}
	})
	if n != 1 {
		d.t.Fatalf("%d claims of %s, want 1", n, in)
	}
	return v
}

// wantOps checks the kinds of ops.
func (d *desk) wantOps(what string, got []OpKind, want ...OpKind) {
	d.t.Helper()
	if !slices.Equal(got, want) {
		d.t.Errorf("%s: ops %v, want %v", what, got, want)
	}
}

func ep(s string) Endpoint { return EndpointFrom(netip.MustParseAddrPort(s)) }
