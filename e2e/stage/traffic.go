package stage

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// Steady calls once repeatedly in the background until stop, which returns the number of
// calls. An error ends the calls and fails the test.
func (s *Scene) Steady(once func() error) (stop func() int) {
	s.T.Helper()
	end, ended := make(chan struct{}), make(chan error, 1)
	n := 0
	go func() {
		for {
			select {
			case <-end:
				ended <- nil
				return
			default:
			}
			if err := once(); err != nil {
				ended <- err
				return
			}
			n++
		}
	}()
	stop = sync.OnceValue(func() int {
		close(end)
		if err := <-ended; err != nil {
			s.T.Errorf("after %d that went well: %v", n, err)
		}
		return n
	})
	s.T.Cleanup(func() { stop() })
	return stop
}

// FreshPorts returns a function that sends one packet from a port that the peer has not
// used yet, and checks that it arrives at in. It sends 500 packets a second at most, so that
// the ports last for almost two minutes.
//
// Linux before 6.17 may lose a packet that comes just as its permission is renewed
// (docs/what-it-cannot-do.md), so there one of them may be lost.
func (s *Scene) FreshPorts(in *lab.Socket, peer netip.Addr, ext netip.AddrPort) func() error {
	port, pace := uint16(10_000), time.NewTicker(2*time.Millisecond)
	s.T.Cleanup(pace.Stop)
	mayMiss, release, err := lab.KernelBefore(6, 17)
	s.Must(err)
	return func() error {
		<-pace.C
		if port++; port == 0 {
			return errors.New("all ports are used")
		}
		from, err := s.Outside.Socket(peer, port)
		if err != nil {
			return err
		}
		defer from.Close()
		p := Payload("from a fresh port")
		if err := from.Send(ext, p); err != nil {
			return err
		}
		if _, err = in.Expect(p); err != nil && mayMiss {
			s.T.Logf("Linux %s: %v", release, err)
			mayMiss = false
			return nil
		}
		return err
	}
}

// OnOnePort returns a function that sends one packet from the same port of the peer each
// time, and checks that it arrives at in.
func (s *Scene) OnOnePort(in, from *lab.Socket, ext netip.AddrPort) func() error {
	return func() error {
		p := Payload("on an existing child")
		if err := from.Send(ext, p); err != nil {
			return err
		}
		_, err := in.Expect(p)
		return err
	}
}

// GetsIn reports whether a packet of from arrives at in within a few milliseconds. It
// first discards packets that are already there.
func (s *Scene) GetsIn(in, from *lab.Socket, ext netip.AddrPort) bool {
	s.T.Helper()
	p := Payload("packet")
	s.Must(from.Send(ext, p))
	for {
		switch got, _, err := in.Recv(5 * time.Millisecond); {
		case err != nil:
			return false
		case got == p:
			return true
		}
	}
}

// Peers is how many outside addresses Peer knows.
const Peers = 500

// Peer returns the outside address number i, for tests that need many.
func Peer(i int) netip.Addr {
	if i < Peers/2 {
		return netip.AddrFrom4([4]byte{203, 0, 113, byte(1 + i)})
	}
	return netip.AddrFrom4([4]byte{192, 0, 2, byte(1 + i - Peers/2)})
}

// A Flow is from an inside port to a peer.
type Flow struct {
	Port uint16
	Peer netip.Addr
}

// Known returns the flows that have a claim.
func (s *Scene) Known() map[Flow]bool {
	s.T.Helper()
	all := make(map[Flow]bool)
	for _, p := range s.List() {
		all[Flow{p.Int.Port(), p.Peer}] = true
	}
	return all
}

// Flood prepares n packets, sent out of the lab or into it, and closes the flood when
// the test ends; see lab.NewFlood.
func (s *Scene) Flood(n int, out bool) *lab.Flood {
	s.T.Helper()
	f, err := s.NewFlood(n, out)
	s.Must(err)
	s.T.Cleanup(func() { s.Must(f.Close()) })
	return f
}

// Scan prepares packets from some ports of the first inside host, beginning with
// firstPort, each to every Peer.
func (s *Scene) Scan(firstPort uint16, ports int) *lab.Flood {
	s.T.Helper()
	f := s.Flood(ports*Peers, true)
	for i := range f.Len() {
		f.Aim(i, netip.AddrPortFrom(s.Inside(0).Addr, firstPort+uint16(i/Peers)), netip.AddrPortFrom(Peer(i%Peers), 9))
	}
	return f
}

// FirstAnswer lets in contact peer, while answer, on the same address, sends without
// pause until in gets a packet. It returns how long that took from the arrival of the
// contact.
func FirstAnswer(in, peer, answer *lab.Socket) (time.Duration, error) {
	ext, err := in.Contact(peer)
	arrived := time.Now()
	if err != nil {
		return 0, err
	}
	raw, err := in.SyscallConn()
	if err != nil {
		return 0, err
	}
	var buf [64]byte
	for {
		if err := answer.Send(ext, "answer"); err != nil {
			return 0, err
		}
		var got int
		err := raw.Read(func(fd uintptr) bool {
			got, _, _ = unix.Recvfrom(int(fd), buf[:], unix.MSG_DONTWAIT)
			return true
		})
		if err != nil {
			return 0, err
		}
		took := time.Since(arrived)
		if got > 0 {
			return took, nil
		}
		if took > Patience() {
			return 0, fmt.Errorf("no answer got through to %v", ext)
		}
	}
}
