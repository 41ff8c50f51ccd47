package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// Offloaded packets bypass all rules and cause no events, so the daemon has to ask
// the kernel about such flows.

// offloadLifetime is the lifetime of permissions in these tests.
const offloadLifetime = 3 * time.Second

// offloadModes are the nft backend, with packet counting, and auto without. The
// counters do not cover packets of a flow in a flowtable in either mode.
var offloadModes = []struct{ backend, counting string }{{"nft", "1"}, {"auto", "0"}}

// An offloadScene is a lab whose gateway offloads, with a daemon, an inside host,
// its peer, and a child from another port of that peer.
type offloadScene struct {
	*scene
	in, peer, child *lab.Socket
	ext             netip.AddrPort
}

// newOffloaded makes an offloadScene with both flows answered.
func newOffloaded(t *testing.T, backend, counting string) *offloadScene {
	t.Helper()
	s := &offloadScene{scene: newOffloadScene(t, lab.Options{})}
	// Flows must end soon after their last packet. Old kernels (5.10) lack the
	// first setting and keep an idle flow in the flowtable for 30 s.
	_ = s.Gateway.SetSysctl("net.netfilter.nf_flowtable_udp_timeout", "3")
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout_stream", "4"))
	s.Start("--subnet", lab.InsideNet.String(), "--backend="+backend,
		"--lifetime="+offloadLifetime.String(), "--reconcile=1s")
	s.Must(s.Gateway.SetSysctl(accounting, counting)) // the daemon has turned it on
	s.in, s.peer, s.child = s.InsideSocket(0, 0), s.anotherPort(), s.anotherPort()
	s.ext = s.Contact(s.in, s.peer)
	s.Stands(s.in, s.peer, s.ext)
	s.talk(s.peer)
	s.talk(s.child)
	return s
}

// anotherPort opens a port of the peer that nobody has seen yet.
func (s *offloadScene) anotherPort() *lab.Socket { return s.PeerSocket(lab.PeerA, 0) }

// talk sends packets both ways, enough for a flow to be offloaded.
func (s *offloadScene) talk(with *lab.Socket) {
	s.T.Helper()
	for range 3 {
		s.Arrives(s.in, with, s.ext)
		if got := s.Contact(s.in, with); got != s.ext {
			s.T.Fatalf("the outside endpoint is %v, was %v", got, s.ext)
		}
	}
}

// offloads reports whether the flow with this port of the peer is offloaded; flows
// reports whether there is such a flow.
func (s *offloadScene) offloads(with *lab.Socket) bool {
	s.T.Helper()
	return hasPort(offloaded(s.scene), with)
}

func (s *offloadScene) flows(with *lab.Socket) bool {
	s.T.Helper()
	return hasPort(s.ConntrackList("-p", "udp"), with)
}

func hasPort(entries []string, with *lab.Socket) bool {
	return strings.Contains(strings.Join(entries, "\n"), fmt.Sprintf("port=%d ", with.Addr().Port()))
}

func TestOffloadTakesAnsweredFlowsAndAnsweredChildren(t *testing.T) {
	for _, mode := range offloadModes {
		t.Run(mode.backend, func(t *testing.T) {
			s := newOffloaded(t, mode.backend, mode.counting)
			before := s.passed()
			for name, with := range map[string]*lab.Socket{"flow": s.peer, "child": s.child} {
				if !s.offloads(with) {
					t.Errorf("the %s is not offloaded though answered\n%s", name, s.Dump())
				}
				s.talk(with)
			}
			if after := s.passed(); after != before {
				t.Errorf("packets of offloaded flows pass the rules: before %s\nafter %s", before, after)
			}
		})
	}
}

func TestOffloadedTrafficKeepsThePermission(t *testing.T) {
	for _, mode := range offloadModes {
		for _, test := range []struct {
			name string
			of   func(s *offloadScene) (talks, silent *lab.Socket)
		}{
			{"of the inside host's own flow", func(s *offloadScene) (talks, silent *lab.Socket) { return s.peer, s.child }},
			{"of a child", func(s *offloadScene) (talks, silent *lab.Socket) { return s.child, s.peer }},
		} {
			t.Run(mode.backend+" "+test.name, func(t *testing.T) {
				s := newOffloaded(t, mode.backend, mode.counting)
				talks, silent := test.of(s)
				before := s.passed()
				began := s.Listed(s.in, s.peer, s.ext, "standing")
				s.Until("the silent flow is gone", func() bool {
					s.talk(talks)
					return !s.flows(silent)
				})
				alone := s.Listed(s.in, s.peer, s.ext, "standing")
				s.Until("the permission was fed for more lifetimes", func() bool {
					s.talk(talks)
					now := s.Listed(s.in, s.peer, s.ext, "standing")
					return now.Expires.Sub(alone.Expires) > 2*offloadLifetime
				})
				// The permission never ended meanwhile, and no packet passed the
				// rules.
				if now := s.Listed(s.in, s.peer, s.ext, "standing"); now.Since.Sub(began.Since) > time.Second {
					t.Errorf("granted at %v, and again at %v\n%s", began.Since, now.Since, s.Dump())
				}
				if after := s.passed(); after != before || !s.offloads(talks) {
					t.Errorf("not offloaded all the time: before %s\nafter %s\n%s", before, after, s.Dump())
				}
				s.Arrives(s.in, s.anotherPort(), s.ext)

				s.Until("the permission ended after the traffic", func() bool { return len(s.List()) == 0 })
				fence := s.PeerSocket(lab.PeerB, 0)
				s.Contact(s.in, fence)
				s.Lost(s.in, s.anotherPort(), s.ext, fence)
			})
		}
	}
}
