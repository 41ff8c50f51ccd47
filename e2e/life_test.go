package e2e

import (
	"errors"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// shortFlows makes the kernel forget idle flows after a second.
func (s *scene) shortFlows() {
	s.T.Helper()
	for _, name := range []string{"nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"} {
		s.Must(s.Gateway.SetSysctl("net.netfilter."+name, "1"))
	}
}

// drain throws away what was received.
func drain(sock *lab.Socket) {
	for {
		if _, _, err := sock.Recv(time.Millisecond); err != nil {
			return
		}
	}
}

// The peer sends until after the end. That keeps its flow alive, but not the
// permission; when the permission ends, so does that flow.
func TestPermissionOutlivesItsFlowAndEndsAfterLifetime(t *testing.T) {
	t.Parallel() // mostly it waits
	s := newScene(t, lab.Options{})
	s.shortFlows()
	s.Start("--subnet", lab.InsideNet.String(), "--lifetime", "10s", "--reconcile", "1s")
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, proxy)
	s.Until("the first flow is gone", func() bool { return s.Listed(phone, proxy, ext, "standing").Flows == 0 })
	s.Arrives(phone, media, ext)
	s.Until("the permission ended", func() bool {
		s.Must(media.Send(ext, stage.Payload("keep alive")))
		return len(s.List()) == 0
	})
	if left := s.ConntrackList("expect"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	drain(phone)
	fence := s.PeerSocket(lab.PeerB, 5060)
	s.Contact(phone, fence)
	s.Lost(phone, media, ext, fence)
}

func TestAnsweredChildHoldsThePermission(t *testing.T) {
	t.Parallel() // mostly it waits
	s := newScene(t, lab.Options{})
	s.shortFlows()
	s.Start("--subnet", lab.InsideNet.String(), "--lifetime", "6s", "--reconcile", "1s")
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, media, ext)
	began := time.Now()
	s.Until("three lifetimes passed", func() bool {
		s.Must(phone.Send(media.Addr(), stage.Payload("answer")))
		s.Stands(phone, proxy, ext)
		return time.Since(began) > 18*time.Second
	})
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A paused daemon reads old events late: they extend nothing. A flow that began just
// now still gets its permission, because the kernel's timeout shows how old the flow
// is.
//
// Fails when the loop does not recognise late events, and when no reconcile follows.
func TestDaemonThatWasStoppedExtendsNothing(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, backend := range []string{"auto", "expect"} {
		t.Run(backend, func(t *testing.T) {
			s := play(t, lab.Options{}, "--backend="+backend, "--lifetime=6s", "--reconcile=1h")
			s.Must(s.Daemon.Pause())
			began := time.Now()
			old, young, proxy := s.InsideSocket(0, 5060), s.InsideSocket(0, 5062), s.PeerSocket(lab.PeerA, 5060)
			s.Contact(old, proxy)
			s.Until("two lifetimes passed", func() bool { return time.Since(began) > 12*time.Second })
			ext := s.Contact(young, proxy)
			s.Must(s.Daemon.Resume())
			s.Stands(young, proxy, ext)
			for _, p := range s.List() {
				if p.Int == old.Addr() && p.State == "standing" {
					t.Errorf("a permission stands two lifetimes after the last packet: %+v", p)
				}
			}
			s.Arrives(young, s.PeerSocket(lab.PeerA, 5070), ext)
		})
	}
}

// Without counters a living flow does not count as continuous traffic.
//
// Fails when the model does not know the flow timeouts.
func TestPermissionEndsALifetimeAfterTheLastPacketWithoutCounters(t *testing.T) {
	t.Parallel() // mostly it waits
	s := newScene(t, lab.Options{})
	s.Start("--subnet", lab.InsideNet.String(), "--lifetime=8s", "--reconcile=1s")
	s.Must(s.Gateway.SetSysctl(accounting, "0"))
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Until("the permission ended", func() bool {
		return !slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.State == "standing" })
	})
	if !slices.ContainsFunc(s.ConntrackList("-p", "udp"), func(l string) bool {
		return strings.Contains(l, "src="+phone.Addr().Addr().String()+" ")
	}) {
		t.Error("it ended with its flow")
	}
}

func TestFlowOlderThanTheDaemonGetsItsPermission(t *testing.T) {
	s := newScene(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5070), ext, proxy)
	s.Start("--subnet", lab.InsideNet.String())
	// Ready means that the existing flows have their permissions.
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	// The lost packet left a flow that ended on the gateway; the daemon has deleted it.
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5072), ext)
}

// A peer's packet that comes before the first contact is confirmed as a flow to the
// gateway itself, which would swallow later packets. The daemon deletes such flows.
// Fails when Granted does not repair.
func TestEarlyPacketBeforeFirstContact(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false")
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	other := s.InsideSocket(0, 5061) // learns the outside address
	mapped := s.Contact(other, s.PeerSocket(lab.PeerB, 9))
	early := replacePort(mapped, 5060)
	s.Must(media.Send(early, stage.Payload("early")))
	s.flowFrom(media)

	ext := s.Contact(phone, proxy)
	if ext != early {
		t.Fatalf("outside endpoint %v, want %v", ext, early)
	}
	s.Stands(phone, proxy, ext)
	s.Until("the early flow is gone", func() bool { return !s.hasFlowFrom(media) })
	s.Arrives(phone, media, ext)
}

// The early packet comes after the first contact, but before the daemon can act. Fails
// when seeEarly only notes the flow.
func TestEarlyPacketAfterFirstContact(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false", "--backend=expect") // else the kernel learns it in time
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	s.Must(s.Daemon.Pause())
	ext := s.Contact(phone, proxy)
	s.Lost(phone, media, ext, proxy)
	s.flowFrom(media)
	s.Must(s.Daemon.Resume())
	s.Stands(phone, proxy, ext)
	s.Until("the early flow is gone", func() bool { return !s.hasFlowFrom(media) })
	s.Arrives(phone, media, ext)
	if st := s.Status(); st.Counters.Early != 1 {
		t.Errorf("%d early packets counted, want 1", st.Counters.Early)
	}
}

// The early packet has exactly the ports of the host's flow: NAT then moves that flow,
// and the permission is for the port that it gets.
func TestEarlyPacketMovesTheMapping(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	early := replacePort(s.Contact(s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerB, 9)), 5060)
	s.Must(proxy.Send(early, stage.Payload("early")))
	s.flowFrom(proxy)
	ext := s.Contact(phone, proxy)
	if ext == early {
		t.Fatal("NAT did not move the flow")
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}

// With the guard an early packet leaves no flow at all, and the mapping stays.
func TestGuardKeepsEarlyPacketsFromBecomingFlows(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	own := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 4500)
	early := replacePort(s.Contact(s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerB, 9)), 5060)
	for _, from := range []*lab.Socket{proxy, media} {
		s.Must(from.Send(early, stage.Payload("early")))
	}
	// The gateway's own ports work as before. Packets arrive in order.
	s.Arrives(own, media, replacePort(early, 4500))
	for _, l := range s.ConntrackList("-p", "udp") {
		if strings.Contains(l, "src=203.0.113.5 dst=198.51.100.1") && strings.Contains(l, "dport=5060") {
			t.Errorf("an early packet became a flow: %s", l)
		}
	}
	ext := s.Contact(phone, proxy)
	if ext != early {
		t.Errorf("the mapping moved to %v", ext)
	}
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, media, ext)
	s.Until("the drops are counted", func() bool {
		s.Must(s.Daemon.Signal(syscall.SIGHUP)) // reads the counters too
		return s.Status().Tables.Guard.Drops >= 2
	})
}

// hasFlowFrom reports whether an unanswered conntrack entry has from as its original
// source.
func (s *scene) hasFlowFrom(from *lab.Socket) bool {
	return slices.ContainsFunc(s.ConntrackList("-p", "udp"), func(l string) bool {
		return strings.Contains(l, "UNREPLIED") && strings.Contains(l, "src="+from.Addr().Addr().String()) &&
			strings.Contains(l, "sport="+itoa(from.Addr().Port())+" ")
	})
}

// flowFrom waits for such an entry: the packet was confirmed.
func (s *scene) flowFrom(from *lab.Socket) {
	s.T.Helper()
	s.Until("the early packet has a flow", func() bool { return s.hasFlowFrom(from) })
}

var timeout = regexp.MustCompile(`^udp +17 \d+ `)

// table is the conntrack table without timeouts, which change.
func (s *scene) table() []string {
	s.T.Helper()
	var out []string
	for _, l := range s.ConntrackList("-p", "udp") {
		out = append(out, timeout.ReplaceAllString(l, ""))
	}
	slices.Sort(out)
	return out
}

// netfilter are all sysctls below net.netfilter.
func (s *scene) netfilter() map[string]string {
	s.T.Helper()
	all := map[string]string{}
	s.Must(s.Gateway.Do(func() error {
		const dir = "/proc/sys/net/netfilter"
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			if e.Name() == "nf_conntrack_count" || e.IsDir() {
				continue
			}
			b, e2 := os.ReadFile(dir + "/" + e.Name())
			err = errors.Join(err, e2)
			all[e.Name()] = string(b)
		}
		return err
	}))
	return all
}

func TestStopLeavesNothing(t *testing.T) {
	s := newScene(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	rules, err := s.Ruleset()
	s.Must(err)
	table, sysctls := s.table(), s.netfilter()

	s.Start("--subnet", lab.InsideNet.String())
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext) // a child without answer
	if len(s.InKernel()) != 1 || stage.UsesExpectAlone() && len(s.Anchors()) != 1 {
		t.Fatalf("want one permission, and its anchor\n%s", s.Dump())
	}
	s.Stop()

	if left := s.ConntrackList("expect"); len(left) > 0 {
		t.Errorf("expectations left: %q", left)
	}
	if got := s.table(); !slices.Equal(got, table) {
		t.Errorf("conntrack table\nbefore %q\nafter  %q", table, got)
	}
	if got, err := s.Ruleset(); err != nil || got != rules {
		t.Errorf("rule set changed: %v\n%s", err, got)
	}
	for name, was := range sysctls {
		if now := s.netfilter()[name]; now != was {
			t.Errorf("sysctl %s was %q, is %q", name, was, now)
		}
	}
}

// No event reports this child, like one that arrives just before the stop.
func TestStopTakesAChildThatNoEventToldOf(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
	s.Arrives(phone, media, ext)
	s.Stop()
	if s.hasFlowFrom(media) {
		t.Errorf("the child is left\n%s", s.Dump())
	}
}

// The next daemon takes over what a killed one left, even permissions without a flow.
// What is no longer allowed ends, and its child with it.
func TestRestartAfterKillTakesOverWhatStands(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 3})
	s.Start("--subnet", lab.InsideNet.String())
	held, lingering, forbidden := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.InsideSocket(2, 5062)
	a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
	extHeld, extLingering, extForbidden := s.Contact(held, a), s.Contact(lingering, a), s.Contact(forbidden, b)
	s.Stands(held, a, extHeld)
	s.Stands(lingering, a, extLingering)
	s.Stands(forbidden, b, extForbidden)
	child := s.PeerSocket(lab.PeerB, 5070)
	s.Arrives(forbidden, child, extForbidden)
	s.Kill()
	s.Arrives(held, s.PeerSocket(lab.PeerA, 5070), extHeld) // the kernel goes on alone
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5061", "--orig-port-dst", "5060")
	s.Must(err)

	s.Start("--subnet", lab.InsideNet.String(), "--exclude-peer", lab.PeerB.String()+"/32")
	if n := s.Status().Counters.Granted; n != 0 {
		t.Errorf("%d permissions were granted anew, want all taken over", n)
	}
	s.Arrives(held, s.PeerSocket(lab.PeerA, 5071), extHeld)
	s.Arrives(lingering, s.PeerSocket(lab.PeerA, 5072), extLingering)
	s.Until("the forbidden one is gone", func() bool {
		return len(s.List()) == 2 && len(s.InKernel()) == 2 && !s.hasFlowFrom(child)
	})
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left after stop: %q", left)
	}
}

// A daemon dies again and again, sooner than a lifetime after its start. Only traffic from inside
// extends a permission, so one without any ends all the same.
//
// Fails when a start renews what it takes over.
func TestDaemonThatDiesAgainAndAgainKeepsNothingUp(t *testing.T) {
	for name, mode := range map[string][]string{"expect": stage.Expect, "nft": stage.NFT} {
		t.Run(name, func(t *testing.T) {
			stage.OfTheDaemon(t)
			s := newScene(t, lab.Options{Inside: 2})
			flags := append(stage.Flags(mode), "--lifetime=10s", "--reconcile=1s") // longer than a start on a busy machine
			s.Start(flags...)
			silent, sends, peer := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
			s.Stands(silent, peer, s.Contact(silent, peer))
			ext := s.Contact(sends, peer)
			s.Stands(sends, peer, ext)
			s.Kill()
			_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060", "--orig-port-dst", "5060")
			s.Must(err)
			s.Until("the permission of the silent host is gone", func() bool {
				s.Start(flags...)
				s.Contact(sends, peer)
				gone := !slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Int == silent.Addr() })
				s.Kill()
				return gone
			})
			s.Start(flags...)
			s.Arrives(sends, s.PeerSocket(lab.PeerA, 5070), ext)
		})
	}
}

// After a kill an anchor outlives its expectation by a minute. The next daemon removes
// it.
//
// Fails when the daemon looks only at anchors that have an expectation.
func TestAnchorWhoseExpectationRanOutGoes(t *testing.T) {
	for name, next := range map[string]string{"by the same carrier": "expect", "by the other one": "nft"} {
		t.Run(name, func(t *testing.T) {
			stage.OfTheDaemon(t)
			s := newScene(t, lab.Options{Inside: 2})
			s.Start(stage.Flags(stage.Expect)...)
			phone, other, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(other, proxy)
			s.Stands(phone, proxy, s.Contact(phone, proxy))
			s.Stands(other, proxy, ext)
			s.Kill()
			for _, args := range [][]string{{"-F", "expect"}, {"-D", "-p", "udp", "--orig-port-src", "5060", "--orig-port-dst", "5060"}} {
				_, err := s.Gateway.Output("conntrack", args...)
				s.Must(err)
			}
			if n := len(s.Anchors()); n != 2 {
				t.Fatalf("%d anchors, want 2\n%s", n, s.Dump())
			}
			s.Start(stage.Flags([]string{"--backend=" + next})...)
			s.Stands(other, proxy, ext)
			if n, want := len(s.Anchors()), map[string]int{"expect": 1}[next]; n != want {
				t.Errorf("%d anchors, want %d\n%s", n, want, s.Dump())
			}
			s.Stop()
			if left := s.Leftovers(); len(left) > 0 {
				t.Errorf("left after stop: %q", left)
			}
		})
	}
}

// With on_stop = "keep" a stop is like a kill: the next program takes over.
func TestStopThatKeepsLeavesThePermissions(t *testing.T) {
	s := play(t, lab.Options{}, "--on-stop", "keep")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Stop()
	s.outlives(phone, ext)
}

// outlives checks that a permission for lab.PeerA stands without a daemon, and that the next
// daemon takes it over and leaves nothing.
func (s *scene) outlives(phone *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Start("--subnet", lab.InsideNet.String())
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		s.T.Errorf("left after stop: %q", left)
	}
}

// Fails when SIGUSR1 is handled like SIGTERM.
func TestStopForAnUpgradeLeavesThePermissions(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Must(s.Daemon.Signal(syscall.SIGUSR1))
	s.Until("the daemon ends", func() bool {
		_, code := s.CLI("status")
		return code != 0
	})
	s.Kill() // reaps it
	s.outlives(phone, ext)
}

func TestCleanupTakesEveryTraceOfADeadDaemon(t *testing.T) {
	s := newScene(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	table := s.table()
	s.Start("--subnet", lab.InsideNet.String())
	if out, code := s.CLI("cleanup"); code != 1 || !strings.Contains(out, "already running") {
		t.Errorf("cleanup beside a running daemon: exit %d, %q", code, out)
	}
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Kill()
	out, code := s.CLI("cleanup")
	removed := "0 expectations, 0 anchors, 1 element"
	if stage.UsesExpectAlone() {
		removed = "1 expectation, 1 anchor, 0 elements"
	}
	want := "removed " + removed + " of the map, 1 unanswered child\nremoved nftables tables: conenat\n"
	if code != 0 || out != want {
		t.Errorf("exit %d, %q, want %q", code, out, want)
	}
	if got := s.table(); !slices.Equal(got, table) {
		t.Errorf("conntrack table\nbefore %q\nafter  %q", table, got)
	}
}
