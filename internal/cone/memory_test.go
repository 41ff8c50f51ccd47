package cone

import (
	"encoding/binary"
	"runtime"
	"testing"
)

// BenchmarkMillion measures a model with a million permissions, each with a flow: the heap that
// each takes, and the time for each of its flows in a snapshot.
func BenchmarkMillion(b *testing.B) {
	const n = 1_000_000
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	d := newDesk(nil, func(p *Policy) { p.Expected, p.Mapped, p.Learned, p.Limits = false, true, true, Limits{} })
	f := *d.translated("10.47.11.109:1", "203.0.113.5:9")
	flow := func(i int) *Flow {
		binary.BigEndian.PutUint32(f.Dst.Addr[12:], 0xcb007100+uint32(i%1000))
		f.ReplySrc, f.Src.Port, f.ID = f.Dst, uint16(1+i/1000), uint32(i)
		f.ReplyDst.Port = f.Src.Port
		return &f
	}
	for i := range n {
		d.m.FlowSeen(0, flow(i))
		if i%1000 == 0 {
			d.m.Ops()
		}
	}
	d.m.Ops()
	runtime.GC()
	runtime.ReadMemStats(&after)
	if s := d.m.Stats(); s.Standing != n || s.Flows != n {
		b.Fatalf("%+v", s)
	}
	bytes := float64(after.HeapAlloc-before.HeapAlloc) / n
	for b.Loop() {
		d.m.BeginSnapshot(1)
		for i := range n {
			d.m.SnapshotFlow(1, flow(i))
		}
		d.m.EndSnapshot(1)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/n, "ns/flow")
	b.ReportMetric(bytes, "B/permission")
}
