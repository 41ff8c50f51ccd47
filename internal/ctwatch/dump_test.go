package ctwatch

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

func TestDumpGivesUDPFlowsOfBothFamilies(t *testing.T) {
	enterNetNS(t)
	sysctl(t, "nf_conntrack_acct", "1")
	makeNoise(t)
	makeAnchor(t, 0, 7, false)
	want := map[cone.Endpoint]cone.Endpoint{}
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		s := listen(t, host+":0")
		s.send(t, endpoint(host+":9"), "x")
		s.send(t, endpoint(host+":9"), "x")
		want[s.endpoint()] = endpoint(host + ":9")
	}
	q := dialQueries(t, Config{})
	for _, noFilter := range []bool{false, true} {
		q.noFilter = noFilter
		got := map[cone.Endpoint]cone.Endpoint{}
		for src, f := range dump(t, q) {
			got[src] = f.Dst
			if !f.HasCounters || f.OrigPackets != 2 || f.ReplyPackets != 0 {
				t.Errorf("counters of %+v", f)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("filter off: %v\n%s", noFilter, diff)
		}
		if q.noFilter != noFilter {
			t.Error("the kernel refused the filter")
		}
	}

	// The kernel's part of the filter: only the UDP entries.
	count := func(encode func(*nfnl.Encoder)) (n int) {
		err := q.query(ipctnlMsgCTGet, unix.NLM_F_DUMP, unix.AF_INET, encode, func([]byte) { n++ })
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if all, udp := count(nil), count(onlyUDP); all < 4 || udp != 2 { // the anchor, too
		t.Errorf("%d entries in all, %d of UDP", all, udp)
	}
}

func TestDumpOfManyFlowsIsWholeAndDoesNotAllocatePerEntry(t *testing.T) {
	enterNetNS(t)
	const flows = 5000
	makeFlows(t, flows)
	q := dialQueries(t, Config{})
	seen := map[cone.Endpoint]bool{}
	if err := q.Dump(func(f *cone.Flow) { seen[f.Dst] = true }); err != nil {
		t.Fatal(err)
	}
	if len(seen) != flows {
		t.Errorf("%d flows, want %d", len(seen), flows)
	}
	n := 0
	allocs := testing.AllocsPerRun(3, func() {
		if err := q.Dump(func(*cone.Flow) { n++ }); err != nil {
			t.Error(err)
		}
	})
	if n != 4*flows || allocs > 100 {
		t.Errorf("%v allocations, %d flows in 4 dumps", allocs, n)
	}
}

// makeFlows makes n entries from one socket to n endpoints.
func makeFlows(t testing.TB, n int) {
	t.Helper()
	s := listen(t, "127.0.0.1:0")
	for i := range n {
		a := netip.AddrFrom4([4]byte{127, 1, byte(i >> 8), byte(i)})
		s.send(t, cone.EndpointFrom(netip.AddrPortFrom(a, 9)), "x")
	}
}

func TestGetFindsAFlowByEitherDirection(t *testing.T) {
	enterNetNS(t)
	nft(t, `table ip n { chain n { type nat hook postrouting priority 100; udp dport 9 snat to 127.0.0.9:4444; }; }`)
	s, q := listen(t, "127.0.0.1:0"), dialQueries(t, Config{})
	peer := endpoint("127.0.0.1:9")
	s.send(t, peer, "x")
	want := dump(t, q)[s.endpoint()]
	if want.ReplyDst != endpoint("127.0.0.9:4444") || !want.Status.Has(cone.StatusSrcNAT) {
		t.Fatalf("not translated: %+v", want)
	}
	for _, tt := range [][2]cone.Endpoint{{s.endpoint(), peer}, {peer, want.ReplyDst}} {
		got, ok, err := q.Get(tt[0], tt[1], 0)
		if !ok || err != nil {
			t.Fatalf("get %v: %v, %v", tt, ok, err)
		}
		if got.Left <= 0 || got.Left > want.Left {
			t.Errorf("%v left after %v", got.Left, want.Left)
		}
		got.Left = want.Left // time passes
		if diff := cmp.Diff(want, got); diff != "" {
			t.Error(diff)
		}
	}
	if _, ok, err := q.Get(s.endpoint(), endpoint("127.0.0.1:10"), 0); ok || err != nil {
		t.Errorf("get of an unknown flow: %v, %v", ok, err)
	}
	if _, _, err := q.Get(s.endpoint(), endpoint("[::1]:9"), 0); err == nil {
		t.Error("two families are no error")
	}
}

func TestGetAndDeleteKeepToTheZone(t *testing.T) {
	enterNetNS(t)
	nft(t, `table ip n { chain n { type filter hook output priority -300;
		udp dport 7 ct original zone set 7
		udp dport 9 ct zone set 9
	}; }`)
	s, q := listen(t, "127.0.0.1:0"), dialQueries(t, Config{})
	for _, tt := range []struct {
		peer             string
		origZone, reZone uint16
	}{{"127.0.0.1:7", 7, 0}, {"127.0.0.1:9", 9, 9}} {
		peer := endpoint(tt.peer)
		s.send(t, peer, "x")
		if _, ok, err := q.Get(s.endpoint(), peer, 0); ok || err != nil {
			t.Errorf("%s: found in the default zone: %v, %v", tt.peer, ok, err)
		}
		f, ok, err := q.Get(s.endpoint(), peer, tt.origZone)
		if !ok || err != nil || f.OrigZone != tt.origZone || f.ReplyZone != tt.reZone {
			t.Fatalf("%s: %v, %v, %+v", tt.peer, ok, err, f)
		}
		back, ok, err := q.Get(f.ReplySrc, f.ReplyDst, f.ReplyZone)
		back.Left = f.Left // time goes on
		if !ok || err != nil || back != f {
			t.Errorf("%s by its reply: %v, %v, %+v", tt.peer, ok, err, back)
		}
		if ok, err := q.Delete(f.Src, f.Dst, 0, f.ID); ok || err != nil {
			t.Errorf("%s deleted in the default zone: %v, %v", tt.peer, ok, err)
		}
		if ok, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID); !ok || err != nil {
			t.Errorf("%s not deleted: %v, %v", tt.peer, ok, err)
		}
	}
}

func TestDeleteTakesOnlyTheEntryWithThatID(t *testing.T) {
	enterNetNS(t)
	makeFlows(t, 3)
	q := dialQueries(t, Config{})
	f := anyFlow(t, q)
	if ok, err := q.Delete(f.Src, f.Dst, 0, f.ID+1); ok || err != nil {
		t.Errorf("delete with a wrong id: %v, %v", ok, err)
	}
	if _, ok, err := q.Get(f.Src, f.Dst, 0); !ok || err != nil {
		t.Errorf("it is gone: %v, %v", ok, err)
	}
	if ok, err := q.Delete(f.Src, f.Dst, 0, f.ID); !ok || err != nil {
		t.Errorf("delete: %v, %v", ok, err)
	}
	if ok, err := q.Delete(f.Src, f.Dst, 0, f.ID); ok || err != nil {
		t.Errorf("delete again: %v, %v", ok, err)
	}
	n := 0
	if err := q.Dump(func(*cone.Flow) { n++ }); err != nil || n != 2 {
		t.Errorf("%d flows are left, want 2 (%v)", n, err)
	}
}

func anyFlow(t testing.TB, q *Queries) (last cone.Flow) {
	t.Helper()
	if err := q.Dump(func(f *cone.Flow) { last = *f }); err != nil {
		t.Fatal(err)
	}
	return last
}

func TestDeleteThatWouldFlushIsNotSent(t *testing.T) {
	enterNetNS(t)
	makeFlows(t, 1)
	q := dialQueries(t, Config{})
	id := attr(nfnl.CTAID, 1, 2, 3, 4)
	for _, attrs := range [][]byte{nil, id, tuples} {
		encode := func(e *nfnl.Encoder) { e.B = append(e.B, attrs...) }
		if err := q.query(ipctnlMsgCTDelete, 0, unix.AF_INET, encode, nil); !errors.Is(err, errFlush) {
			t.Errorf("attributes %x: error %v", attrs, err)
		}
	}
	if anyFlow(t, q) == (cone.Flow{}) {
		t.Error("the table is empty")
	}
}

func BenchmarkRead(b *testing.B) {
	enterNetNS(b)
	w := dialWatcher(b, Config{ReadBuffer: 64 << 20})
	c, err := conntrack.Dial(nil)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	events := make([]Event, 256)
	read := func(n int) {
		for n > 0 {
			k, err := w.Read(events)
			if err != nil {
				b.Fatal(err)
			}
			n -= k
		}
	}
	b.ReportAllocs()
	b.ResetTimer()
	for done := 0; done < b.N; {
		n := min(b.N-done, 10000)
		b.StopTimer()
		if err := w.SetReadDeadline(time.Now().Add(within)); err != nil {
			b.Fatal(err)
		}
		makeFlows(b, n)
		b.StartTimer()
		read(n)
		b.StopTimer()
		if err := c.Flush(); err != nil {
			b.Fatal(err)
		}
		read(n)
		b.StartTimer()
		done += n
	}
}

func BenchmarkDump(b *testing.B) {
	enterNetNS(b)
	makeFlows(b, 10000)
	q := dialQueries(b, Config{})
	n := 0
	b.ReportAllocs()
	for b.Loop() {
		if err := q.Dump(func(*cone.Flow) { n++ }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(n), "ns/entry")
}
