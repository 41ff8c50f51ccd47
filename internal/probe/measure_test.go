package probe

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/stun/v3"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// A server answers on two ports of two loopback addresses, each time as answer says: the socket
// to answer from, if any, and the message.
type server struct {
	socket [2][2]*net.UDPConn // by address and port
	answer func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter)
}

// serve starts a server that behaves as RFC 5780 says if answer is nil.
func serve(t *testing.T, answer func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter)) *server {
	t.Helper()
	s := &server{answer: answer}
	if answer == nil {
		s.answer = (*server).honest
	}
	var ports [2]uint16
	var all sync.WaitGroup
	for address, ip := range []string{"127.0.0.1", "127.0.0.2"} {
		for port := range ports {
			c, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(ip), ports[port])))
			if err != nil {
				t.Fatal(err)
			}
			s.socket[address][port] = c
			ports[port] = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		}
	}
	for address := range s.socket {
		for port, c := range s.socket[address] {
			all.Go(func() { s.run(c, address, port) })
			t.Cleanup(func() { c.Close() })
		}
	}
	t.Cleanup(func() {
		for _, sockets := range s.socket {
			for _, c := range sockets {
				c.Close()
			}
		}
		all.Wait()
	})
	return s
}

func (s *server) addr(address, port int) netip.AddrPort {
	return s.socket[address][port].LocalAddr().(*net.UDPAddr).AddrPort()
}

func (s *server) run(c *net.UDPConn, address, port int) {
	buf := make([]byte, 2048)
	for {
		n, from, err := c.ReadFromUDPAddrPort(buf)
		if err != nil {
			return
		}
		m := new(stun.Message)
		if stun.Decode(buf[:n], m) != nil {
			continue
		}
		var change byte
		if v, err := m.Get(stun.AttrChangeRequest); err == nil {
			change = v[3]
		}
		by, setters := s.answer(s, address, port, change, m, from)
		if by == nil {
			continue
		}
		reply, err := stun.Build(append([]stun.Setter{m}, setters...)...)
		if err == nil {
			_, _ = by.WriteToUDPAddrPort(reply.Raw, from)
		}
	}
}

func (s *server) honest(address, port int, change byte, _ *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
	if change&changeIP != 0 {
		address = 1 - address
	}
	if change&changePort != 0 {
		port = 1 - port
	}
	other, origin := s.addr(1, 1), s.addr(address, port)
	return s.socket[address][port], []stun.Setter{
		stun.BindingSuccess,
		&stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
		&stun.OtherAddress{IP: other.Addr().AsSlice(), Port: int(other.Port())},
		&stun.ResponseOrigin{IP: origin.Addr().AsSlice(), Port: int(origin.Port())},
	}
}

func (s *server) probe(t *testing.T) Result {
	t.Helper()
	a := s.addr(0, 0)
	r, err := Run(t.Context(), Options{Server: Server{Host: a.Addr().String(), Port: a.Port()}, rto: 20 * time.Millisecond})
	if err != nil || len(r.Results) != 1 {
		t.Fatalf("%v, %+v", err, r)
	}
	return r.Results[0]
}

func noteIDs(r Result) string {
	var ids []string
	for _, n := range r.Notes {
		ids = append(ids, n.ID)
	}
	return strings.Join(ids, " ")
}

type answering = func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter)

// Servers that exist, besides the one of the end-to-end tests.
func TestServersOfAllKinds(t *testing.T) {
	for name, tc := range map[string]struct {
		answer  answering
		verdict Verdict
		notes   string
	}{
		"as in RFC 5780": {nil, Open, ""},
		"it loses every first packet": {func() answering {
			var mu sync.Mutex
			seen := make(map[[stun.TransactionIDSize]byte]bool)
			return func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
				mu.Lock()
				defer mu.Unlock()
				if again := seen[m.TransactionID]; !again {
					seen[m.TransactionID] = true
					return nil, nil
				}
				return s.honest(address, port, change, m, from)
			}
		}(), Open, ""},
		"it ignores CHANGE-REQUEST": {func(s *server, address, port int, _ byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.honest(address, port, 0, m, from)
		}, Undecided, "no_change_request"},
		"it refuses CHANGE-REQUEST": {func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			if change != 0 {
				return s.socket[address][port], []stun.Setter{stun.BindingError, stun.CodeUnknownAttribute}
			}
			return s.honest(address, port, 0, m, from)
		}, Undecided, "no_change_request"},
		"it cannot send from elsewhere": {func(s *server, address, port int, change byte, m *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			if change != 0 {
				return nil, nil
			}
			return s.honest(address, port, 0, m, from)
		}, Undecided, "filtering_unproven"},
		"of RFC 3489, with one address": {func(s *server, address, port int, _ byte, _ *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.socket[address][port], []stun.Setter{stun.BindingSuccess, &stun.MappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())}}
		}, Undecided, "no_other_address"},
		"its other address is of the other family": {func(s *server, address, port int, _ byte, _ *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.socket[address][port], []stun.Setter{
				stun.BindingSuccess, &stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
				&stun.OtherAddress{IP: net.IPv6loopback, Port: 3479},
			}
		}, Undecided, "no_other_address"},
		"it asks for a password": {func(s *server, address, port int, _ byte, _ *stun.Message, _ netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.socket[address][port], []stun.Setter{stun.BindingError, stun.CodeUnauthorized}
		}, NoAnswer, ""},
		"it sees nothing": {func(s *server, address, port int, _ byte, _ *stun.Message, _ netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.socket[address][port], []stun.Setter{stun.BindingSuccess, &stun.XORMappedAddress{IP: net.IPv4zero, Port: 0}}
		}, NoAnswer, ""},
		"it answers what nobody asked": {func(s *server, address, port int, _ byte, _ *stun.Message, from netip.AddrPort) (*net.UDPConn, []stun.Setter) {
			return s.socket[address][port], []stun.Setter{
				stun.TransactionID, stun.BindingSuccess, &stun.XORMappedAddress{IP: from.Addr().AsSlice(), Port: int(from.Port())},
			}
		}, NoAnswer, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := serve(t, tc.answer).probe(t)
			if r.Verdict != tc.verdict || noteIDs(r) != tc.notes {
				t.Errorf("%s, %q; want %s, %q\n%+v", r.Verdict, noteIDs(r), tc.verdict, tc.notes, r)
			}
		})
	}
}

// Fails when an interrupt is not heeded while nothing is received.
func TestAnInterruptEndsIt(t *testing.T) {
	asked := make(chan struct{}, 100)
	s := serve(t, func(*server, int, int, byte, *stun.Message, netip.AddrPort) (*net.UDPConn, []stun.Setter) {
		asked <- struct{}{}
		return nil, nil
	})
	ctx, stop := context.WithCancel(t.Context())
	go func() {
		<-asked
		stop()
	}()
	a := s.addr(0, 0)
	_, err := Run(ctx, Options{Server: Server{Host: a.Addr().String(), Port: a.Port()}, rto: time.Hour})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want %v", err, context.Canceled)
	}
}

func TestServersAreNamed(t *testing.T) {
	for text, want := range map[string]string{
		"stun.example.net": "stun.example.net:3478", "stun.example.net:19302": "stun.example.net:19302", "192.0.2.1": "192.0.2.1:3478",
		"192.0.2.1:1": "192.0.2.1:1", "2001:db8::1": "[2001:db8::1]:3478", "[2001:db8::1]": "[2001:db8::1]:3478", "[2001:db8::1]:65535": "[2001:db8::1]:65535",
	} {
		if s, err := ParseServer(text); err != nil || s.String() != want {
			t.Errorf("%q: %v, %v; want %s", text, s, err, want)
		}
	}
	for _, text := range []string{
		"", ":", ":3478", "a:", "a:0", "a:65536", "a:-1", "a:x", "a b", "a:1:2", "[::1", "[]:1", "[]", "stun://a", "me@a", "0.0.0.0", "ff02::1", "[::]:3478",
	} {
		if s, err := ParseServer(text); err == nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %v, %v; want an error", text, s, err)
		}
	}
}
