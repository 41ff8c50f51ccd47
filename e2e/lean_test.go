package e2e

import (
	"net/netip"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/lab"
)

// events = "lean": the kernel reports no flow whose permission it learned.

// lean starts a daemon and waits until the kernel hides flows.
func lean(t *testing.T, o lab.Options, args ...string) *scene {
	t.Helper()
	s := newScene(t, o)
	s.Start(stage.Flags(args, "--events=lean")...)
	s.untilEvents("lean")
	return s
}

func (s *scene) untilEvents(mode string) {
	s.T.Helper()
	s.Until("events are "+mode, func() bool { return s.Status().Events.Mode == mode })
}

// The daemon reads of no flow, and all the same lists and revokes its permission; a new flow
// brings it back. Children come in and are listed.
//
// Fails when flows are reported, and when list and revoke do not look for hidden flows.
func TestLeanDaemonKnowsWhatItDoesNotRead(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT}, func(t *testing.T, mode ...string) {
		s := lean(t, lab.Options{}, mode...)
		in, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		before := s.Status().Events.Received
		ext := s.Contact(in, peer)
		revoked, code := s.CLI("revoke", lab.PeerA.String())
		if code != 0 || !strings.Contains(revoked, "1") {
			t.Errorf("revoke, right after the first packet: %q, status %d", revoked, code)
		}
		if n := s.Status().Events.Received - before; n != 0 {
			t.Errorf("%d events, want none", n)
		}
		other := s.PeerSocket(lab.PeerA, 5070)
		s.Lost(in, other, ext, peer)
		s.Contact(in, s.PeerSocket(lab.PeerA, 5061))
		s.Stands(in, peer, ext) // the daemon has read of the new flow
		s.Arrives(in, other, ext)
		s.Until("the child is listed", func() bool { return s.Listed(in, peer, ext, "standing").Children == 1 })
		s.Verified()
	})
}

// Whoever else listens to conntrack hears of all flows, also of those of learned permissions.
//
// Fails when the daemon does not look for other listeners.
func TestLeanEndsWhileSomebodyListens(t *testing.T) {
	s := lean(t, lab.Options{}, stage.NFT...)
	w, err := ctwatch.Dial(ctwatch.Config{NetNS: s.Gateway.FD()})
	s.Must(err)
	s.untilEvents("all")
	in := s.InsideSocket(0, 5060)
	s.Contact(in, s.PeerSocket(lab.PeerA, 5060))
	var events [8]ctwatch.Event
	n, err := w.Read(events[:])
	s.Must(err)
	if n != 1 || events[0].Kind != ctwatch.New || events[0].Flow.Src.Netip() != in.Addr() {
		t.Errorf("events %+v", events[:n])
	}
	s.Must(w.Close())
	s.untilEvents("lean")
	if _, err := exec.LookPath("conntrack"); err != nil {
		t.Skip("no conntrack(8)")
	}
	stop := s.Steady(func() error {
		_, err := s.Gateway.Output("timeout", "0.1", "conntrack", "-E")
		if err != nil && strings.Contains(err.Error(), "exit status 124") {
			err = nil
		}
		return err
	})
	s.untilEvents("all")
	stop()
}

// A daemon that was killed does not leave the kernel hiding flows.
//
// Fails when the element of the set lean has no timeout.
func TestLeanEndsAfterTheDaemon(t *testing.T) {
	s := lean(t, lab.Options{}, stage.NFT...)
	s.Kill()
	s.Until("the set is empty", func() bool {
		out, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "lean")
		s.Must(err)
		return !strings.Contains(out, "udp")
	})
}

// With events = "auto" the kernel hides flows while many begin, and reports all again later.
//
// Fails when the rate does not matter.
func TestManyNewFlowsMakeEventsLean(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT}, manyNewFlowsMakeEventsLean)
}

func manyNewFlowsMakeEventsLean(t *testing.T, mode ...string) {
	s := newScene(t, lab.Options{})
	s.Start(stage.Flags(mode, "--learn-rate=100000", "--max-permissions-per-host=0")...)
	if mode := s.Status().Events.Mode; mode != "all" {
		t.Errorf("events are %q at first", mode)
	}
	const flows = 4000
	f, round := s.Flood(flows, true), 0
	s.Until("events are lean", func() bool {
		for i := range flows {
			f.Aim(i, netip.AddrPortFrom(s.Inside(0).Addr, uint16(10_000+i)), netip.AddrPortFrom(stage.Peer(round), 5060))
		}
		round++
		s.Must(f.Send(0, flows))
		return s.Status().Events.Mode == "lean"
	})
	s.untilEvents("all")
}

// A permission whose flow ended before the daemon knew it ends, too.
//
// Fails when permissions do not end with the reading of the table.
func TestLeanPermissionEnds(t *testing.T) {
	t.Parallel() // mostly it waits
	s := lean(t, lab.Options{}, append(slices.Clone(stage.NFT), "--lifetime=30s", "--reconcile=1s")...)
	ext := s.Contact(s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060))
	if n := len(s.entries()); n != 1 {
		t.Fatalf("%d permissions in the map", n)
	}
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "5060")
	s.Must(err)
	s.Until(ext.String()+" has no permission", func() bool { return len(s.entries()) == 0 && len(s.List()) == 0 })
}

// A flow whose source is faked by another inside link ends, and the kernel reports that.
//
// Fails when a flow that the daemon did not know gives a permission because it ended.
func TestLeanFlowWithAFakedSourceEarnsNothing(t *testing.T) {
	s := lean(t, lab.Options{Guest: true}, append(slices.Clone(stage.NFT), "--reconcile=1s")...)
	for _, link := range []string{"all", "guest0"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
	}
	victim, fence := netip.AddrPortFrom(s.Inside(0).Addr, 7777), s.InsideSocket(0, 5062)
	attacker, peer := s.PeerSocket(lab.PeerA, 9), s.PeerSocket(lab.PeerB, 9)
	s.IP(s.Guest, "addr add "+victim.Addr().String()+"/32 dev lo")
	s.Must(s.Socket(s.Guest.Namespace, victim.Addr(), victim.Port()).Send(attacker.Addr(), "faked"))
	_, err := attacker.Expect("faked")
	s.Must(err)
	ext := s.Contact(fence, peer)
	for _, port := range []string{"7777", "5062"} {
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", port)
		s.Must(err)
	}
	s.Stands(fence, peer, ext) // so the daemon has looked at both
	for _, p := range s.List() {
		if p.Int == victim {
			t.Errorf("it earned %+v", p)
		}
	}
	if n := len(s.entries()); n != 1 {
		t.Errorf("%d permissions in the map, want that of the other flow", n)
	}
}

// quiet = true: the kernel reports no flow that can have no permission, whatever carries
// permissions, and reports all of them while somebody else listens.
//
// Fails when the daemon does not keep the set quiet, and when it does not look for other
// listeners.
func TestQuietHidesWhatCanHaveNoPermission(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect, {"--backend=nft", "--learn=false"}}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		if slices.Equal(mode, stage.Auto) { // expectations carry, and the kernel learns nothing
			s.Must(s.NFT(lab.DropPolicy))
		}
		s.Start(stage.Flags(mode, "--events=all", "--quiet")...)
		until := func(quiet bool) {
			t.Helper()
			s.Until("quiet changes", func() bool { return s.Status().Events.Quiet == quiet })
		}
		until(true)
		in, dns := s.InsideSocket(0, 5053), s.PeerSocket(lab.PeerA, 53)
		before := s.Status().Events.Received
		s.Contact(in, dns)
		if n := s.Status().Events.Received - before; n != 0 {
			t.Errorf("%d events of a flow to an excluded port, want none", n)
		}
		talker, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(talker, peer)
		s.Stands(talker, peer, ext)
		s.Arrives(talker, s.PeerSocket(lab.PeerA, 5070), ext)

		w, err := ctwatch.Dial(ctwatch.Config{NetNS: s.Gateway.FD()})
		s.Must(err)
		until(false)
		s.Contact(s.InsideSocket(0, 5054), dns)
		var events [8]ctwatch.Event
		n, err := w.Read(events[:])
		s.Must(err)
		if n != 1 || events[0].Kind != ctwatch.New || events[0].Flow.Src.Port != 5054 {
			t.Errorf("events %+v", events[:n])
		}
		s.Must(w.Close())
		until(true)
		s.Verified()
	})
}
