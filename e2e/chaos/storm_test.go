package chaos

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	stormPorts = 400 // each sends to all peers
	few        = 10  // entries that are not UDP
)

// A storm: 200,000 new flows, half of them while the daemon is paused and has buffer for
// a few hundred events. Some flows end before the daemon looks. Finally each living flow
// has its permission, and nothing else has one, in the daemon and in the kernel.
//
// Fails when the loop does not reconcile after an overrun; not in mode expect, whose
// table the first events fill.
func TestStorm(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFTByEvent, stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		s.Start(stage.Flags(mode, "--max-permissions-per-host=0", "--learn-rate=100000",
			"--event-buffer=65536", "--reconcile=1h")...)
		limit := s.Status().Permissions.Limit

		s.Must(s.Daemon.Pause())
		storm(s, 0, stormPorts/2)
		gone := fmt.Sprint(firstPort + stormPorts/4) // no event of its flows fitted into the buffer
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", gone)
		s.Must(err)
		s.Must(s.Daemon.Resume())
		storm(s, stormPorts/2, stormPorts)

		began := time.Now()
		s.UntilIn(5*stage.Patience(), "nearly all that lives has its permission", func() bool {
			p := s.Status().Permissions
			anchors := p.Expectations
			return p.Standing >= min(entries(s)-anchors-few, limit)
		})
		took := time.Since(began)
		living := flows(s)
		s.UntilIn(5*stage.Patience(), "the rest has too", func() bool { return s.Status().Permissions.Standing >= min(len(living), limit) })
		st := s.Status()
		if len(living) < stormPorts*stage.Peers/2 {
			t.Fatalf("%d flows of %d came into being", len(living), stormPorts*stage.Peers)
		}
		room := len(living) <= limit
		t.Logf("%d flows live, %d permissions stand after %v; %d overruns, %d events came",
			len(living), st.Permissions.Standing, took.Round(time.Millisecond), st.Events.Overruns, st.Events.Received)
		if st.Events.Overruns == 0 {
			t.Error("no event was lost: this was no storm")
		}
		learns := !slices.Contains(mode, "--learn=false") && !slices.Contains(mode, "--backend=expect")
		standing := 0
		for _, p := range s.List() {
			f := stage.Flow{Port: p.Int.Port(), Peer: p.Peer}
			_, lives := living[f]
			delete(living, f)
			switch {
			case p.State == "standing":
				standing++
			case room && lives:
				t.Fatalf("%+v", p)
			}
			// A permission may outlive its flow; but without learning nobody ever saw
			// these flows.
			if !lives && !learns {
				t.Fatalf("a permission without a flow: %+v", p)
			}
		}
		if room && len(living) > 0 || !room && standing < limit {
			t.Errorf("%d permissions stand, %d flows have no claim", standing, len(living))
		}
		// A permission that the kernel learned and no event reported expires by itself.
		unknown := 0
		if learns {
			unknown = stage.Peers
		}
		if n := inKernel(s, mode); n < standing || n > standing+unknown {
			t.Errorf("%d permissions stand, %d are in the kernel", standing, n)
		}
		leavesNothing(s)
	})
}

// entries counts the conntrack entries.
func entries(s *stage.Scene) int {
	s.T.Helper()
	return sysctl(s, "nf_conntrack_count")
}

const firstPort = 10_000

// storm sends a packet from each of some ports to each peer, as fast as it can.
func storm(s *stage.Scene, first, end int) {
	s.T.Helper()
	for i := first; i < end; i++ {
		in, err := s.Inside(0).Socket(s.Inside(0).Addr, uint16(firstPort+i))
		s.Must(err)
		for p := range stage.Peers {
			s.Must(in.Send(netip.AddrPortFrom(stage.Peer(p), 9), "x"))
		}
		s.Must(in.Close())
	}
}

// flows returns the flows that live.
func flows(s *stage.Scene) map[stage.Flow]struct{} {
	s.T.Helper()
	all := make(map[stage.Flow]struct{})
	for _, line := range s.ConntrackList("-p", "udp", "--src-nat") {
		var f stage.Flow
		for _, word := range strings.Fields(line) { // the original direction comes first
			key, value, _ := strings.Cut(word, "=")
			switch {
			case key == "dst" && !f.Peer.IsValid():
				f.Peer = netip.MustParseAddr(value)
			case key == "sport" && f.Port == 0:
				_, err := fmt.Sscan(value, &f.Port)
				s.Must(err)
			}
		}
		if f.Port != 0 { // an anchor has port 0
			all[f] = struct{}{}
		}
	}
	return all
}

// inKernel counts the permissions that the kernel holds.
func inKernel(s *stage.Scene, mode []string) int {
	s.T.Helper()
	if slices.Contains(mode, "--backend=expect") {
		return len(s.ConntrackList("expect"))
	}
	return s.CountElements()
}
