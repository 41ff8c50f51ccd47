package stage

import (
	"errors"
	"net/netip"
	"sync"
	"time"

	"github.com/conenatd/conenatd/internal/lab"
)

// Steady calls once again and again beside the test, until stop, which returns
// how often it did. An error ends it and fails the test.
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

// FreshPorts returns a function that sends one packet from a port of the peer
// that it never used before, and sees it arrive at in.
func (s *Scene) FreshPorts(in *lab.Socket, peer netip.Addr, ext netip.AddrPort) func() error {
	port := uint16(10_000)
	return func() error {
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
		_, err = in.Expect(p)
		return err
	}
}

// OnOnePort returns a function that sends one packet from a port of the peer,
// always the same, and sees it arrive at in.
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

// GetsIn reports whether a packet of from arrives at in within a few milliseconds.
// What was there before is thrown away.
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

// Known returns the flows to which there is a claim.
func (s *Scene) Known() map[Flow]bool {
	s.T.Helper()
	all := make(map[Flow]bool)
	for _, p := range s.List() {
		all[Flow{p.Int.Port(), p.Peer}] = true
	}
	return all
}
