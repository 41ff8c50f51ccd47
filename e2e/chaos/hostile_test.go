package chaos

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// An outside host without a permission sends to every outside port, including one on
// which a peer has a permission. Nothing gets in, no flow is made, and the daemon gets no
// event.
//
// Fails with --guard=false.
func TestFloodOfStrangers(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{})
		s.Start(stage.Flags(mode, "--reconcile=1h")...)
		phone, proxy, stranger := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		before, entriesBefore, events := s.List(), entries(s), s.Status().Events.Received
		drops := s.Status().Tables.Guard.Drops

		const all = 1<<16 - 1
		cpu := cpuTime(s)
		for port := 1; port <= all; port++ {
			s.Must(stranger.Send(netip.AddrPortFrom(ext.Addr(), uint16(port)), "flood"))
		}
		s.Lost(phone, stranger, ext, proxy)
		cpu = cpuTime(s) - cpu

		if n := entries(s); n > entriesBefore+few {
			t.Errorf("%d entries of conntrack, %d before", n, entriesBefore)
		}
		st := s.Status()
		if n := st.Events.Received - events; n > few {
			t.Errorf("the daemon heard of %d flows", n)
		}
		t.Logf("%d packets, %d dropped by the guard, %d events, %v of the daemon's CPU",
			all, st.Tables.Guard.Drops-drops, st.Events.Received-events, cpu)
		if after := s.List(); len(after) != len(before) || timeless(after[0]) != timeless(before[0]) {
			t.Errorf("%+v, before %+v", after, before)
		}
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	})
}

// timeless is p without its times, which vary by milliseconds.
func timeless(p control.Permission) control.Permission {
	p.Since, p.Expires = time.Time{}, time.Time{}
	return p
}

// cpuTime is the CPU time that the daemon used so far (proc_pid_stat(5)).
func cpuTime(s *stage.Scene) time.Duration {
	s.T.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", s.Daemon.PID()))
	s.Must(err)
	const user, system, tick = 14, 15, 10 * time.Millisecond
	fields := strings.Fields(string(b)) // the name contains no blank
	var sum time.Duration
	for _, f := range []int{user, system} {
		n, err := strconv.Atoi(fields[f-1])
		s.Must(err)
		sum += time.Duration(n) * tick
	}
	return sum
}

// A permitted peer, or a host that fakes its address, sends from every port. It gets at
// most max_children flows; other peers still get theirs.
//
// Fails with --max-children=0.
func TestFloodOfAPermittedPeer(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{Inside: 2})
		s.Start(stage.Flags(mode)...)
		phone, other := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
		a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
		ext, extOther := s.Contact(phone, a), s.Contact(other, b)
		s.Stands(phone, a, ext)
		s.Stands(other, b, extOther)
		before := entries(s)
		s.Must(s.Outside.Do(func() error {
			for port := 1; port < 1<<16; port++ {
				if port == 5060 {
					continue
				}
				from := net.UDPAddrFromAddrPort(netip.AddrPortFrom(lab.PeerA, uint16(port)))
				c, err := net.DialUDP("udp4", from, net.UDPAddrFromAddrPort(ext))
				if err != nil {
					return err
				}
				if _, err := c.Write([]byte("flood")); err != nil {
					return err
				}
				if err := c.Close(); err != nil {
					return err
				}
			}
			return nil
		}))
		const most = 256 // max_children
		made := entries(s) - before
		t.Logf("%d flows came of it", made)
		if made > most+few {
			t.Errorf("%d entries of conntrack were made, the limit is %d", made, most)
		}
		s.Arrives(other, s.PeerSocket(lab.PeerB, 5070), extOther)
		// The flood filled the socket's queue.
		s.Until("its own flow goes on", func() bool { return s.GetsIn(phone, a, ext) })
	})
}

// Outside hosts fake the source of an inside host: they send to many peers, and as its
// existing flow. Others send to its outside port all the time. They make no flow and no
// permission, and extend none.
//
// Fails with --guard=false.
func TestNoStrangerMakesOrExtends(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{})
		for name, value := range map[string]string{
			"net.ipv4.conf.all.rp_filter": "0", "net.ipv4.conf.wan0.rp_filter": "0",
			"net.netfilter.nf_conntrack_udp_timeout": "2",
		} {
			s.Must(s.Gateway.SetSysctl(name, value))
		}
		s.Start(stage.Flags(mode, "--lifetime=8s")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)

		const strangers = 1000
		flood := s.Flood(3*strangers, false)
		for i := range strangers {
			flood.Aim(3*i, netip.AddrPortFrom(phone.Addr().Addr(), uint16(20_000+i)), netip.AddrPortFrom(stage.Peer(i%stage.Peers), 9))
			flood.Aim(3*i+1, phone.Addr(), proxy.Addr())
			flood.Aim(3*i+2, netip.AddrPortFrom(lab.PeerB, uint16(20_000+i)), ext)
		}
		stop := s.Steady(func() error { return flood.Send(0, flood.Len()) })
		s.Until("the permission is gone, as if nobody had sent", func() bool {
			ps := s.List()
			if len(ps) > 1 {
				t.Fatalf("a stranger made permissions: %+v ...", ps[1])
			}
			return len(ps) == 0
		})
		n := stop()
		guard := s.Status().Tables.Guard
		t.Logf("%d packets, %d dropped for their source, %d for nobody waits for them", n*flood.Len(), guard.Spoofed, guard.Drops)
		if guard.Spoofed == 0 || guard.Drops == 0 {
			t.Error("the guard saw none of them")
		}
		if n := entries(s); n > few {
			t.Errorf("%d flows came of it", n)
		}
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600")) // for the fence's flow
		fence := s.PeerSocket(lab.PeerC, 5060)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), s.Contact(phone, fence), fence)
	})
}
