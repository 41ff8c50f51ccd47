package lab

import (
	"fmt"
	"net"
	"net/netip"
	"time"
)

// receiveTimeout bounds the wait for a packet that must come. Only a failing test uses it
// up, so it suits the slowest emulated machine.
const receiveTimeout = 5 * time.Second

// Socket is a UDP socket in a namespace. Send may be called concurrently; only one
// goroutine may receive.
type Socket struct {
	*net.UDPConn
	ns  *Namespace
	buf [1 << 16]byte // the receiver's
}

// Socket opens a UDP socket in the namespace; port 0 lets the kernel choose.
func (n *Namespace) Socket(addr netip.Addr, port uint16) (*Socket, error) {
	conn, err := n.ListenUDP(netip.AddrPortFrom(addr, port))
	if err != nil {
		return nil, err
	}
	return &Socket{UDPConn: conn, ns: n}, nil
}

// Addr returns the socket's own endpoint.
func (s *Socket) Addr() netip.AddrPort {
	return unmap(s.LocalAddr().(*net.UDPAddr).AddrPort())
}

// Send sends one packet.
func (s *Socket) Send(to netip.AddrPort, payload string) error {
	_, err := s.WriteToUDPAddrPort([]byte(payload), to)
	return err
}

// Recv waits for the next packet. If none comes in time, the error is
// [os.ErrDeadlineExceeded]; [Lost] is a better way to show that a packet does not
// come.
func (s *Socket) Recv(timeout time.Duration) (payload string, from netip.AddrPort, err error) {
	if err := s.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return "", netip.AddrPort{}, err
	}
	n, from, err := s.ReadFromUDPAddrPort(s.buf[:])
	return string(s.buf[:n]), unmap(from), err
}

// Expect waits for the next packet, which must have this payload, and returns its
// source.
func (s *Socket) Expect(payload string) (from netip.AddrPort, err error) {
	got, from, err := s.Recv(receiveTimeout)
	if err != nil {
		return from, fmt.Errorf("receive %q: %w", payload, err)
	}
	if got != payload {
		return from, fmt.Errorf("receive %q: got %q from %s", payload, got, from)
	}
	return from, nil
}

// Contact sends a packet and returns the source that the receiver sees: through a
// NAT, the outside endpoint of the mapping.
func (s *Socket) Contact(to *Socket) (seen netip.AddrPort, err error) {
	payload := fmt.Sprintf("contact from %s", s.Addr())
	if err := s.Send(to.Addr(), payload); err != nil {
		return netip.AddrPort{}, err
	}
	return to.Expect(payload)
}

// unmap turns IPv4-mapped addresses into IPv4, so that endpoints of all sockets can
// be compared.
func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port())
}
