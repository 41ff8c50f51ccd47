package e2e

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// shortFlows makes the kernel forget idle flows after a second.
func (s *scene) shortFlows() {
	s.t.Helper()
	for _, name := range []string{"nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"} {
		s.must(s.Gateway.SetSysctl("net.netfilter."+name, "1"))
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

// The peer goes on sending to the end and beyond: that keeps its flow alive, but
// not the permission, and the flow goes with the permission.
func TestPermissionOutlivesItsFlowAndEndsAfterLifetime(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.shortFlows()
	s.start("--subnet", lab.InsideNet.String(), "--lifetime", "4s", "--reconcile", "1s")
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	ext := s.contact(phone, proxy)
	s.until("the first flow is gone", func() bool { return s.listed(phone, proxy, ext, "standing").Flows == 0 })
	s.arrives(phone, media, ext)
	s.until("the permission ended", func() bool {
		s.must(media.Send(ext, payload("keep alive")))
		return len(s.list()) == 0
	})
	if left := s.conntrack("expect"); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
	drain(phone)
	fence := s.peer(lab.PeerB, 5060)
	s.contact(phone, fence)
	s.lost(phone, media, ext, fence)
}

func TestAnsweredChildHoldsThePermission(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.shortFlows()
	s.start("--subnet", lab.InsideNet.String(), "--lifetime", "2s", "--reconcile", "1s")
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.arrives(phone, media, ext)
	began := time.Now()
	s.until("three lifetimes passed", func() bool {
		s.must(phone.Send(media.Addr(), payload("answer")))
		s.stands(phone, proxy, ext)
		return time.Since(began) > 6*time.Second
	})
	s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
}

func TestFlowOlderThanTheDaemonGetsItsPermission(t *testing.T) {
	s := newScene(t, lab.Options{})
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.lost(phone, s.peer(lab.PeerA, 5070), ext, proxy)
	s.start("--subnet", lab.InsideNet.String())
	// Ready means that the flows that were there have their permissions.
	s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
	// The lost packet left a flow that ended on the gateway: repaired.
	s.arrives(phone, s.peer(lab.PeerA, 5072), ext)
}

// A packet of the peer's that came before anybody sent to it is confirmed as a
// flow to the gateway itself, and would swallow the later ones. The daemon takes
// such flows away. Fails if Granted does not repair.
func TestEarlyPacketBeforeFirstContact(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false")
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	other := s.inside(0, 5061) // learns the outside address
	mapped := s.contact(other, s.peer(lab.PeerB, 9))
	early := replacePort(mapped, 5060)
	s.must(media.Send(early, payload("early")))
	s.flowFrom(media)

	ext := s.contact(phone, proxy)
	if ext != early {
		t.Fatalf("outside endpoint %v, want %v", ext, early)
	}
	s.stands(phone, proxy, ext)
	s.until("the early flow is gone", func() bool { return !s.hasFlowFrom(media) })
	s.arrives(phone, media, ext)
}

// The early packet comes after the first contact and before the daemon could
// act. Fails if seeEarly only notes the flow.
func TestEarlyPacketAfterFirstContact(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false", "--backend=expect") // learned, it would not be early
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	s.must(s.d.Pause())
	ext := s.contact(phone, proxy)
	s.lost(phone, media, ext, proxy)
	s.flowFrom(media)
	s.must(s.d.Resume())
	s.stands(phone, proxy, ext)
	s.until("the early flow is gone", func() bool { return !s.hasFlowFrom(media) })
	s.arrives(phone, media, ext)
	if st := s.status(); st.Counters.Early != 1 {
		t.Errorf("%d early packets counted, want 1", st.Counters.Early)
	}
}

// The early packet has the very ports of the flow: NAT moves the flow then, and
// the permission is for the port that it got.
func TestEarlyPacketMovesTheMapping(t *testing.T) {
	s := play(t, lab.Options{}, "--guard=false")
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	early := replacePort(s.contact(s.inside(0, 5061), s.peer(lab.PeerB, 9)), 5060)
	s.must(proxy.Send(early, payload("early")))
	s.flowFrom(proxy)
	ext := s.contact(phone, proxy)
	if ext == early {
		t.Fatal("NAT did not move the flow")
	}
	s.stands(phone, proxy, ext)
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
}

// With the guard an early packet leaves no flow at all, and the mapping stays.
func TestGuardKeepsEarlyPacketsFromBecomingFlows(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	own := s.socket(s.Gateway.Namespace, s.Gateway.Addr, 4500)
	early := replacePort(s.contact(s.inside(0, 5061), s.peer(lab.PeerB, 9)), 5060)
	for _, from := range []*lab.Socket{proxy, media} {
		s.must(from.Send(early, payload("early")))
	}
	// The gateway's own ports are served as ever. The packets come in order.
	s.arrives(own, media, replacePort(early, 4500))
	for _, l := range s.conntrack("-p", "udp") {
		if strings.Contains(l, "src=203.0.113.5 dst=198.51.100.1") && strings.Contains(l, "dport=5060") {
			t.Errorf("an early packet became a flow: %s", l)
		}
	}
	ext := s.contact(phone, proxy)
	if ext != early {
		t.Errorf("the mapping moved to %v", ext)
	}
	s.stands(phone, proxy, ext)
	s.arrives(phone, media, ext)
	s.until("the drops are counted", func() bool {
		s.must(s.d.Signal(syscall.SIGHUP)) // reads the counters too
		return s.status().Tables.Guard.Drops >= 2
	})
}

// hasFlowFrom reports whether a conntrack entry has from as its first source.
func (s *scene) hasFlowFrom(from *lab.Socket) bool {
	return slices.ContainsFunc(s.conntrack("-p", "udp"), func(l string) bool {
		return strings.Contains(l, "UNREPLIED") && strings.Contains(l, "src="+from.Addr().Addr().String()) &&
			strings.Contains(l, "sport="+itoa(from.Addr().Port())+" ")
	})
}

// flowFrom waits until there is one: the packet was confirmed.
func (s *scene) flowFrom(from *lab.Socket) {
	s.t.Helper()
	s.until("the early packet has a flow", func() bool { return s.hasFlowFrom(from) })
}

var timeout = regexp.MustCompile(`^udp +17 \d+ `)

// table is the conntrack table without timeouts, which change.
func (s *scene) table() []string {
	s.t.Helper()
	var out []string
	for _, l := range s.conntrack("-p", "udp") {
		out = append(out, timeout.ReplaceAllString(l, ""))
	}
	slices.Sort(out)
	return out
}

// netfilter are all sysctls below net.netfilter.
func (s *scene) netfilter() map[string]string {
	s.t.Helper()
	all := map[string]string{}
	s.must(s.Gateway.Do(func() error {
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
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	rules, err := s.Ruleset()
	s.must(err)
	table, sysctls := s.table(), s.netfilter()

	s.start("--subnet", lab.InsideNet.String())
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext) // a child without answer
	if len(s.inKernel()) != 1 || usesExpect() && len(s.anchors()) != 1 {
		t.Fatalf("want one permission, and its anchor\n%s", s.dump())
	}
	s.stop()

	if left := s.conntrack("expect"); len(left) > 0 {
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

// No event tells of this child, as of one that comes in the last moment.
func TestStopTakesAChildThatNoEventToldOf(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy, media := s.inside(0, 5060), s.peer(lab.PeerA, 5060), s.peer(lab.PeerA, 5070)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
	s.arrives(phone, media, ext)
	s.stop()
	if s.hasFlowFrom(media) {
		t.Errorf("the child is left\n%s", s.dump())
	}
}

// What a killed daemon left is taken over by the next one, even if no flow holds
// it any more; what is not allowed any more goes, and its child with it.
func TestRestartAfterKillTakesOverWhatStands(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 3})
	s.start("--subnet", lab.InsideNet.String())
	held, lingering, forbidden := s.inside(0, 5060), s.inside(1, 5061), s.inside(2, 5062)
	a, b := s.peer(lab.PeerA, 5060), s.peer(lab.PeerB, 5060)
	extHeld, extLingering, extForbidden := s.contact(held, a), s.contact(lingering, a), s.contact(forbidden, b)
	s.stands(held, a, extHeld)
	s.stands(lingering, a, extLingering)
	s.stands(forbidden, b, extForbidden)
	child := s.peer(lab.PeerB, 5070)
	s.arrives(forbidden, child, extForbidden)
	s.kill()
	s.arrives(held, s.peer(lab.PeerA, 5070), extHeld) // the kernel goes on alone
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5061", "--orig-port-dst", "5060")
	s.must(err)

	s.start("--subnet", lab.InsideNet.String(), "--exclude-peer", lab.PeerB.String()+"/32")
	if n := s.status().Counters.Granted; n != 0 {
		t.Errorf("%d permissions were granted anew, want all taken over", n)
	}
	s.arrives(held, s.peer(lab.PeerA, 5071), extHeld)
	s.arrives(lingering, s.peer(lab.PeerA, 5072), extLingering)
	s.until("the forbidden one is gone", func() bool {
		return len(s.list()) == 2 && len(s.inKernel()) == 2 && !s.hasFlowFrom(child)
	})
	s.stop()
	if left := s.leftovers(); len(left) > 0 {
		t.Errorf("left after stop: %q", left)
	}
}

// With on_stop = "keep" a stop is like a kill: a new program takes over.
func TestStopThatKeepsLeavesThePermissions(t *testing.T) {
	s := play(t, lab.Options{}, "--on-stop", "keep")
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	s.stands(phone, proxy, ext)
	s.stop()
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.start("--subnet", lab.InsideNet.String())
	s.arrives(phone, s.peer(lab.PeerA, 5071), ext)
	s.stop()
	if left := s.leftovers(); len(left) > 0 {
		t.Errorf("left after stop: %q", left)
	}
}

func TestCleanupTakesEveryTraceOfADeadDaemon(t *testing.T) {
	s := newScene(t, lab.Options{})
	phone, proxy := s.inside(0, 5060), s.peer(lab.PeerA, 5060)
	ext := s.contact(phone, proxy)
	table := s.table()
	s.start("--subnet", lab.InsideNet.String())
	if out, code := s.cli("cleanup"); code != 1 || !strings.Contains(out, "already running") {
		t.Errorf("cleanup beside a running daemon: exit %d, %q", code, out)
	}
	s.arrives(phone, s.peer(lab.PeerA, 5070), ext)
	s.kill()
	out, code := s.cli("cleanup")
	expectations, elements := 1, 1
	if !usesExpect() {
		expectations = 0
	}
	if strings.Contains(os.Getenv(modeEnv), "--backend=expect") {
		elements = 0
	}
	want := fmt.Sprintf("removed %d expectations, %d anchors, %d elements of the map, 1 unanswered children\n",
		expectations, expectations, elements)
	if code != 0 || out != want {
		t.Errorf("exit %d, %q, want %q", code, out, want)
	}
	if got := s.table(); !slices.Equal(got, table) {
		t.Errorf("conntrack table\nbefore %q\nafter  %q", table, got)
	}
}
