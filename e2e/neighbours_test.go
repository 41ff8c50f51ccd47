package e2e

import (
	"fmt"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// newFlows makes perSecond new flows a second from the second inside host, until
// stop.
func (s *scene) newFlows(perSecond int) (stop func()) {
	s.T.Helper()
	proxy := s.PeerSocket(lab.PeerB, 40000)
	pace := time.NewTicker(time.Second / time.Duration(perSecond))
	var port atomic.Uint32
	end := s.Steady(func() error {
		<-pace.C
		in, err := s.Inside(1).Socket(s.Inside(1).Addr, uint16(20000+port.Add(1)%40000))
		if err != nil {
			return err
		}
		defer in.Close()
		return in.Send(proxy.Addr(), stage.Payload("new flow"))
	})
	return func() {
		end()
		pace.Stop()
	}
}

// The kernel learns permissions of new flows, and the daemon grants the same ones
// again. These no-op transactions do not hide a new forward, which takes effect long before
// the next reconcile.
func TestForwardIsNoticedWhileFlowsBegin(t *testing.T) {
	for name, change := range map[string]func(s *scene, port int) error{
		"an element": func(s *scene, port int) error {
			return s.NFT(fmt.Sprintf("add element ip fw m { %d : %v }", port, s.Inside(1).Addr))
		},
		"a rule": func(s *scene, port int) error {
			return s.NFT(fmt.Sprintf("add rule ip fw pre iifname wan0 udp dport %d dnat to %v", port, s.Inside(1).Addr))
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip fw {
	map m { type inet_service : ipv4_addr; }
	chain pre {
		type nat hook prerouting priority dstnat;
		iifname "wan0" dnat to udp dport map @m
	}
}
`}, "--reconcile=1h")
			var slowest time.Duration
			defer s.newFlows(20)()
			proxy := s.PeerSocket(lab.PeerA, 5060)
			for port := 5061; port <= 5066; port++ {
				phone := s.InsideSocket(0, uint16(port))
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				began := time.Now()
				s.Must(change(s, port))
				s.Listed(phone, proxy, ext, "refused")
				slowest = max(slowest, time.Since(began))
				server := s.InsideSocket(1, uint16(port))
				s.Arrives(server, s.PeerSocket(lab.PeerA, uint16(port+100)), netip.AddrPortFrom(s.Gateway.Addr, uint16(port)))
			}
			t.Logf("noticed after %v at most", slowest)
		})
	}
}
