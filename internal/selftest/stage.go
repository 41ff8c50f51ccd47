package selftest

import (
	"fmt"
	"net/netip"

	"github.com/conenatd/conenatd/internal/lab"
)

// A failure is what must panics with.
type failure struct{ error }

// must ends the running attempt if there is an error. It must be called on the goroutine of
// the attempt, so not by functions that Do runs.
func must(err error) {
	if err != nil {
		panic(failure{err})
	}
}

// get returns v, or ends the running attempt if there is an error.
func get[T any](v T, err error) T {
	must(err)
	return v
}

// attempt calls f, and returns the error with which must ended it.
func attempt(f func()) (err error) {
	defer func() {
		switch p := recover().(type) {
		case nil:
		case failure:
			err = p.error
		default:
			panic(p)
		}
	}()
	f()
	return nil
}

// A stage is a lab with its daemon and sockets. Its methods end the attempt on an error.
type stage struct {
	*lab.Lab
	exe     string
	args    []string
	d       *lab.Daemon
	sockets []*lab.Socket
}

// onStage attempts f in a lab of its own, with a daemon's program and arguments.
func onStage(o lab.Options, exe string, args []string, f func(s *stage)) error {
	l, err := lab.New(o)
	if err != nil {
		return err
	}
	defer l.Close()
	s := &stage{Lab: l, exe: exe, args: args}
	defer s.close()
	return attempt(func() { f(s) })
}

func (s *stage) start() { s.d = get(s.StartDaemon(s.exe, s.args...)) }

func (s *stage) stop() {
	d := s.d
	s.d = nil
	must(d.Stop())
}

func (s *stage) close() {
	for _, sock := range s.sockets {
		sock.Close()
	}
	if s.d != nil {
		_ = s.d.Kill() // the check's error says what went wrong
	}
}

// open opens a socket, to be closed with the stage.
func (s *stage) open(h *lab.Host, addr netip.Addr, port uint16) *lab.Socket {
	sock := get(h.Socket(addr, port))
	s.sockets = append(s.sockets, sock)
	return sock
}

// inside opens a socket on inside host i.
func (s *stage) inside(i int, port uint16) *lab.Socket {
	return s.open(s.Inside(i), s.Inside(i).Addr, port)
}

// A cast is the SIP device, its proxy on two ports, and a stranger.
type cast struct{ device, proxy, other, stranger *lab.Socket }

func (s *stage) cast() cast {
	return cast{
		s.inside(0, 5060),
		s.open(s.Outside, lab.PeerA, 5060), s.open(s.Outside, lab.PeerA, 5070), s.open(s.Outside, lab.PeerC, 5060),
	}
}

// cast6 is cast for IPv6.
func (s *stage) cast6() cast {
	return cast{
		s.open(s.Inside(0), s.Inside(0).Addr6, 5060),
		s.open(s.Outside, lab.Peer6A, 5060), s.open(s.Outside, lab.Peer6A, 5070), s.open(s.Outside, lab.Peer6B, 5060),
	}
}

// contact lets the device send to its proxy, and returns the outside endpoint.
func (c cast) contact() netip.AddrPort { return get(c.device.Contact(c.proxy)) }

// admits checks that the proxy's other port reaches the device by ext, and the stranger does not.
func (c cast) admits(ext netip.AddrPort) {
	must(lab.Arrives(c.device, lab.Packet{From: c.other, To: ext, Payload: "from the other port"}))
	must(lab.Lost(c.device,
		lab.Packet{From: c.stranger, To: ext, Payload: "from a stranger"},
		lab.Packet{From: c.proxy, To: ext, Payload: "fence"}))
}

// seed plays the question of 2003. It returns the outside endpoint.
func (s *stage) seed() netip.AddrPort {
	c := s.cast()
	ext := c.contact()
	c.admits(ext)
	return ext
}

// arrives checks that a packet from a port of the proxy's address reaches the device.
func (s *stage) arrives(device *lab.Socket, port uint16, ext netip.AddrPort) {
	from := s.open(s.Outside, lab.PeerA, port)
	must(lab.Arrives(device, lab.Packet{From: from, To: ext, Payload: fmt.Sprintf("from port %d", port)}))
}
