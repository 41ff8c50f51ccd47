package chaos

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// What is refused is retried once in an interval.
const (
	interval = time.Second
	retry    = "--reconcile=1s"
	short    = "--lifetime=30s" // the model's clock ticks 64 times in a lifetime
)

const (
	tableFull = "table_full"
	noRoom    = "no_room"
)

// Others fill conntrack. Anchors must not take their room: old and new permissions are
// refused, or stand in the map alone. When the others are gone, all of them stand as
// expectations. The size of the table belongs to the machine, not to this namespace,
// so the test skips a large one.
//
// Fails when a refused permission is retried at once, when it is never retried, and
// when an anchor stays in a full table.
func TestFullConntrack(t *testing.T) {
	stage.InModes(t, [][]string{stage.Expect, stage.Auto}, func(t *testing.T, mode ...string) {
		const n = 200
		s := stage.New(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy})
		if most := sysctl(s, "nf_conntrack_max"); most > 1<<19 {
			t.Skipf("conntrack has room for %d entries, which take too long to make", most)
		}
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		// No flow may be idle for a lifetime before all stand, however busy the machine is.
		s.Start(stage.Flags(mode, retry, "--lifetime=4m")...)
		talker, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(talker, proxy)
		s.Stands(talker, proxy, ext)

		// A paused daemon does not refresh permissions, so the pause must be short.
		o := newOthers(s)
		o.most()
		s.Must(s.Daemon.Pause())
		c := newCrowd(s, n)
		s.Until("all flows are there", func() bool {
			c.Must(c.flood.Send(0, n)) // a busy machine loses packets
			return len(o.udp()) == n+1
		})
		o.fill()
		s.Must(s.Daemon.Resume())

		if slices.Equal(mode, stage.Expect) {
			refusedNowAndThen(s, noRoom, n+1)
		}
		s.Until("they stand in the map alone", func() bool {
			p := s.Status().Permissions
			return p.Expectations == 0 && p.Standing+p.Refused == n+1
		})
		if !stage.Warned(s.Status(), "raise net.netfilter.nf_conntrack_max") {
			t.Errorf("no warning: %q", s.Status().Warnings)
		}
		s.Arrives(talker, proxy, ext)
		s.Lost(talker, s.PeerSocket(lab.PeerA, 5070), ext, proxy) // the table has no room for a child

		began := time.Now()
		o.end()
		s.Until("all stand", func() bool { return s.Status().Permissions.Expectations == n+1 })
		t.Logf("right again %v after others let go of conntrack", time.Since(began).Round(time.Millisecond))
		s.Arrives(talker, s.PeerSocket(lab.PeerA, 5071), ext)
		c.children(firstAddr)
		leavesNothing(s)
	})
}

// Others hold half of the expectation table, and more permissions are wanted than fit
// beside them: the rest is refused, or stands in the map alone. When the others end,
// and then some of ours, the rest takes their room.
//
// Fails when a refused permission is retried at once, and when it is never retried.
func TestFullExpectations(t *testing.T) {
	stage.InModes(t, [][]string{stage.Expect, stage.Auto}, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{Guest: true, Rules: lab.Masquerade + lab.DropPolicy})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		table := sysctl(s, "nf_conntrack_expect_max")
		if table > 1<<14 {
			t.Skipf("there is room for %d expectations, which take too long to make", table)
		}
		others := expectations(s, table/2)
		s.Start(stage.Flags(mode, retry, short, "--learn-rate=100000")...)

		limit := table * 3 / 4
		wanted := limit + 2*peersOnPort
		full := func(n, wanted int) func() bool {
			return func() bool {
				p := s.Status().Permissions
				return p.Expectations == n && (p.Standing == n && slices.Equal(mode, stage.Expect) || p.Standing == wanted)
			}
		}
		c := newCrowd(s, wanted)
		c.known()
		s.Until("the table is full", full(table-others, wanted))
		if n := len(s.ConntrackList("expect")); n != table {
			t.Errorf("%d expectations, want %d", n, table)
		}
		if slices.Equal(mode, stage.Expect) {
			refusedNowAndThen(s, tableFull, wanted-(table-others))
			if !strings.Contains(s.Daemon.Output(), tableFull) {
				t.Errorf("no warning: %s", s.Daemon.Output())
			}
		}

		began := time.Now()
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", s.Guest.Addr.String())
		s.Must(err)
		s.Until("as many stand as may", full(limit, wanted))
		took := time.Since(began)
		rest := wanted
		for _, peer := range []netip.Addr{flow(0).Peer, flow(1).Peer} {
			revoke(s, peer)
			rest -= (wanted + peersOnPort - 1) / peersOnPort
		}
		s.Until("the rest stands", full(rest, rest))
		t.Logf("%d wanted, %d stood beside %d of others; %d stood %v after these ended",
			wanted, table-others, others, limit, took.Round(time.Millisecond))
		leavesNothing(s)
	})
}

// More permissions are wanted than max_permissions. The rest is refused, and removed
// from the kernel if it learned them; when others end, the rest stands. The map always
// has room for this limit; package rules tests a full map.
//
// Fails when a refused permission is retried at once, and when it is never retried.
func TestFullLimit(t *testing.T) {
	stage.InModes(t, [][]string{stage.Expect, stage.Auto}, func(t *testing.T, mode ...string) {
		const limit, wanted = 200, 300
		s := stage.New(t, lab.Options{})
		s.Start(stage.Flags(mode, retry, short, "--learn-rate=100000", "--max-permissions="+strconv.Itoa(limit))...)
		c := newCrowd(s, wanted)
		c.known()
		stand := func(n int) func() bool {
			return func() bool { return s.Status().Permissions.Standing == n && inKernel(s, mode) == n }
		}
		s.Until("as many stand as may", stand(limit))
		refusedNowAndThen(s, "total_limit", wanted-limit)

		began := time.Now()
		for i := range peersOnPort / 2 {
			revoke(s, flow(i).Peer)
		}
		s.Until("the rest stands", stand(wanted/2))
		t.Logf("%d of %d stood; when half of them ended the rest did after %v", limit, wanted, time.Since(began).Round(time.Millisecond))
		leavesNothing(s)
	})
}

// The pool has too few ports for the newcomers. Those without a port keep the kernel's
// mapping and their permissions. Status counts them and warns; when mappings end,
// newcomers get pool ports.
//
// Fails when a flow that finds no port is not counted, and when mappings do not end.
func TestFullPool(t *testing.T) {
	const ports, pool = 50, 32 // the even ones of 64 ports
	s := stage.New(t, lab.Options{Inside: 2})
	s.Start(stage.Flags(stage.Auto, retry, "--lifetime=8s", "--mapping=endpoint_independent", "--port-pool=61000-61063")...)
	a, b := s.PeerSocket(lab.PeerA, 3074), s.PeerSocket(lab.PeerB, 3074)
	inPool := func(ext netip.AddrPort) bool { return ext.Port() >= 61000 }
	moved, newcomer := 0, (*lab.Socket)(nil)
	for i := range uint16(ports) {
		s.Contact(s.InsideSocket(0, 3000+2*i), a)
		newcomer = s.InsideSocket(1, 3000+2*i)
		ext := s.Contact(newcomer, b)
		s.Stands(newcomer, b, ext)
		s.Arrives(newcomer, s.PeerSocket(lab.PeerB, 4000+i), ext)
		if inPool(ext) {
			moved++
		}
	}
	st := s.Status()
	if m := st.Tables.Mapping; moved != pool || m.Moved != pool || m.PoolUsedUp != ports-pool {
		t.Errorf("%d in the pool, %+v", moved, m)
	}
	if !stage.Warned(st, "port_pool 61000-61063 had no port for 18 flows") {
		t.Errorf("warnings: %q", st.Warnings)
	}

	began := time.Now()
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", s.Inside(1).Addr.String())
	s.Must(err)
	s.Until("no mapping is in the pool", func() bool {
		out, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "owned")
		s.Must(err)
		return !strings.Contains(out, " . 610")
	})
	if ext := s.Contact(newcomer, a); !inPool(ext) {
		t.Errorf("the last newcomer leaves as %v", ext)
	}
	if n := s.Status().Tables.Mapping.PoolUsedUp; n != ports-pool {
		t.Errorf("%d found no port, want %d as before", n, ports-pool)
	}
	t.Logf("%d of %d newcomers in the pool; room again after %v", moved, ports, time.Since(began).Round(time.Millisecond))
	leavesNothing(s)
}

// refusedNowAndThen waits until the n refused permissions were retried twice, and
// checks that there was no more than one retry of each in an interval.
func refusedNowAndThen(s *stage.Scene, reason string, n int) {
	s.T.Helper()
	refusals := func() int { return int(s.Status().Counters.Refused[reason]) }
	s.Until("they are refused", func() bool { return refusals() >= n })
	began := time.Now()
	before, now := refusals(), 0
	s.Until("they were tried again", func() bool { now = refusals(); return now >= before+2*n })
	if took := time.Since(began); now-before > n*(1+int(took/interval)) {
		s.T.Errorf("%d permissions were refused %d times in %v", n, now-before, took)
	}
	listed := 0
	for _, p := range s.List() {
		if p.State == "refused" && p.Reason == reason {
			listed++
		}
	}
	if listed != n {
		s.T.Errorf("%d are listed as refused because of %q, want %d", listed, reason, n)
	}
}

// sysctl reads a numeric setting of conntrack.
func sysctl(s *stage.Scene, name string) int {
	s.T.Helper()
	text, err := s.Gateway.Sysctl("net.netfilter." + name)
	s.Must(err)
	n, err := strconv.Atoi(text)
	s.Must(err)
	return n
}

func revoke(s *stage.Scene, peer netip.Addr) {
	s.T.Helper()
	if out, code := s.CLI("revoke", "--control-socket", s.Daemon.Socket, peer.String()); code != 0 {
		s.T.Errorf("exit %d, %q", code, out)
	}
}
