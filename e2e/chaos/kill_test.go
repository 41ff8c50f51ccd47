package chaos

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// The daemon is killed and started again, five times, while children talk: none of
// their packets is lost, new children get in while it is dead, and nothing exists
// twice. One permission has no flow but an unanswered child.
//
// Fails when New adopts nothing.
func TestKillAndRestart(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{Inside: 3})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
		mode = append(slices.Clone(mode), "--max-children=0") // because there are many fresh ports
		s.Start(stage.Flags(mode)...)
		proxy := s.PeerSocket(lab.PeerA, 5060)
		var exts []netip.AddrPort
		var stops []func() int
		for i := range 3 {
			in := s.InsideSocket(i, uint16(5060+i))
			ext := s.Contact(in, proxy)
			s.Stands(in, proxy, ext)
			exts = append(exts, ext)
			child := s.PeerSocket(lab.PeerA, uint16(6000+i))
			s.Arrives(in, child, ext)
			if i == 1 {
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-src", in.Addr().Addr().String(), "--orig-dst", lab.PeerA.String())
				s.Must(err)
				s.Until("its own flow is gone", func() bool {
					return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Ext == ext && p.Flows == 0 })
				})
			}
			if i < 2 {
				stops = append(stops, s.Steady(s.OnOnePort(in, child, ext)))
				continue
			}
			stops = append(stops, s.Steady(s.FreshPorts(in, lab.PeerA, ext)))
		}
		before := held(s)
		for range 5 {
			s.Kill()
			if now := held(s); now != before {
				t.Errorf("the kernel holds %+v after the kill, %+v before", now, before)
			}
			s.Start(stage.Flags(mode)...)
			if now := held(s); now != before {
				t.Errorf("the kernel holds %+v after the restart, %+v before", now, before)
			}
			if ps := s.List(); len(ps) != len(exts) {
				t.Errorf("%d permissions, want %d: %+v", len(ps), len(exts), ps)
			}
		}
		for i, stop := range stops {
			if n := stop(); n == 0 {
				t.Errorf("nothing was sent to host %d", i)
			} else {
				t.Logf("%d packets to host %d, none lost", n, i)
			}
		}
		leavesNothing(s)
	})
}

// A daemon that is killed for good leaves nothing in force for longer than a
// lifetime. The rules stay, but without permissions they let nothing in.
//
// Fails when an expectation gets ten lifetimes.
func TestKillForGood(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "5"))
		s.Start(stage.Flags(mode, "--lifetime=10s")...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Kill()
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		s.Until("no permission is left", func() bool {
			h := held(s)
			h.anchors = 0
			return h == holdings{}
		})
		for _, a := range s.Anchors() { // without an expectation an anchor is just an unused entry
			if left, err := strconv.Atoi(strings.Fields(a)[2]); err != nil || left > 60 {
				t.Errorf("an anchor that stays for more than a minute: %s, %v", a, err)
			}
		}
		fence := s.PeerSocket(lab.PeerB, 5060)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 5071), s.Contact(phone, fence), fence)
	})
}

// holdings are what the kernel holds of permissions.
type holdings struct{ expectations, anchors, elements int }

func held(s *stage.Scene) holdings {
	s.T.Helper()
	return holdings{len(s.ConntrackList("expect")), len(s.Anchors()), len(s.Elements())}
}
