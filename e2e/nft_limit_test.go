package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A host at its limit goes on to open flows, and for each of them an older one ends. Each may
// make room for another, but the ruleset changes only now and then: others must be able to list
// it meanwhile. No more stand in the kernel than may, and a host that has room is served.
//
// Fails when each idle permission makes room alone.
func TestNFTFlowsThatEndAtALimitChangeTheRulesetRarely(t *testing.T) {
	const limit, more, most = 640, 100, 60
	s := newScene(t, lab.Options{})
	s.Start("--backend=auto", "--subnet", lab.InsideNet.String(), "--events=all", "--learn-rate=100000", "--max-permissions-per-host", fmt.Sprint(limit))
	// All by different ports, so that they have different permissions.
	send := func(port int) {
		in := s.InsideSocket(0, uint16(port))
		s.Must(in.Send(netip.AddrPortFrom(lab.PeerC, 9), "x"))
		in.Close()
	}
	for i := range limit {
		send(10_000 + i)
	}
	s.Until("as many stand as may", func() bool { return s.Status().Permissions.Standing == limit })

	before := s.generation()
	for i := range more {
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", fmt.Sprint(10_000+i))
		s.Must(err)
		had := s.Status().Counters.Granted + s.Status().Counters.Refused["host_limit"]
		send(20_000 + i)
		s.Until("the daemon has decided", func() bool {
			c := s.Status().Counters
			return c.Granted+c.Refused["host_limit"] > had
		})
	}
	n := s.generation() - before
	t.Logf("%d changes of the ruleset for %d flows", n, more)
	if n > most {
		t.Errorf("%d changes of the ruleset for %d flows, want at most %d", n, more, most)
	}
	st := s.Status().Permissions
	if n := s.CountElements(); n > limit || n != st.Standing || st.Standing < limit-limit/64 {
		t.Errorf("%d elements; %+v", n, st)
	}

	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp")
	s.Must(err)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Until("it is granted", func() bool { return s.Known()[stage.Flow{Port: 5060, Peer: lab.PeerA}] })
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}

// A limit is lowered to fewer than stand, by a reload or for the next daemon, and then the flows of
// all of them end. New flows have their permissions, and no more stand than may. What is beyond the
// limit ends in one transaction.
//
// Fails when as few permissions make room as at a limit that did not change.
func TestNFTRoomIsMadeBeyondALoweredLimit(t *testing.T) {
	t.Parallel() // mostly it waits
	const stood, lowered = 19, 4
	for _, key := range []string{"max_permissions_per_host", "max_permissions_per_subnet", "max_permissions"} {
		for name, change := range map[string]func(s *scene, path string){
			"reload": func(s *scene, _ string) { s.readAgain() },
			"kill": func(s *scene, path string) {
				s.Kill()
				s.Start("--config", path)
			},
		} {
			t.Run(key+", "+name, func(t *testing.T) {
				t.Parallel()
				stage.InModes(t, [][]string{stage.Auto, stage.NFTByEvent, stage.Expect}, func(t *testing.T, mode ...string) {
					s := newScene(t, lab.Options{})
					path := filepath.Join(t.TempDir(), "conenatd.toml")
					write := func(limit int) {
						s.Must(os.WriteFile(path, fmt.Appendf(nil, "%s = %d\n%s", key, limit, toml(mode)), 0o644))
					}
					write(100)
					s.Start("--config", path)
					for i := range stood {
						in := s.InsideSocket(0, uint16(10_000+i))
						s.Must(in.Send(netip.AddrPortFrom(lab.PeerC, 9), "x"))
					}
					s.Until("all stand", func() bool { return s.Status().Permissions.Standing == stood })
					write(lowered)
					change(s, path)
					s.Until("the flows are known", func() bool { return s.flows() == stood })
					_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-dst", "9")
					s.Must(err)
					s.Until("no flow is left", func() bool { return s.flows() == 0 })
					if st := s.Status().Permissions; st.Standing != stood {
						t.Errorf("%+v: nothing should end before there is a new flow", st)
					}
					before := s.generation()
					proxy := s.PeerSocket(lab.PeerA, 5060)
					for i := range lowered {
						phone := s.InsideSocket(0, uint16(20_000+i))
						ext := s.Contact(phone, proxy)
						s.Stands(phone, proxy, ext)
						s.Arrives(phone, s.PeerSocket(lab.PeerA, uint16(7000+i)), ext)
					}
					if n := s.generation() - before; n >= stood {
						t.Errorf("%d changes of the ruleset, as if each permission had ended alone", n)
					}
					if st, up := s.Status().Permissions, len(s.InKernel()); st.Standing != lowered || up != lowered {
						t.Errorf("%+v, and %d in the kernel, want %d", st, up, lowered)
					}
				})
			})
		}
	}
}

// flows returns how many flows hosts have that give permissions.
func (s *scene) flows() (n int) {
	s.T.Helper()
	for _, p := range s.List() {
		n += p.Flows
	}
	return n
}
