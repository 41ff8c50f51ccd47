package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// ErrNoUDPDiag says that the kernel does not find UDP sockets for us. It must
// not be taken for "no socket there": a permission would then take packets that
// a program on the gateway waits for.
var ErrNoUDPDiag = errors.New("the kernel does not find UDP sockets: load the module udp_diag " +
	"(CONFIG_INET_UDP_DIAG; OpenWrt: kmod-inet-diag)")

// Sockets asks the kernel about the UDP sockets of a network namespace
// (sock_diag(7)). It is not safe for concurrent use.
type Sockets struct {
	conn  *conn
	links []uint32 // by which packets from outside come in; 0 if none is known
	found socketAt
	find  func([]byte) error // sets found
}

// socketAt says how the socket that gets a packet is bound.
type socketAt uint8

const (
	nowhere        socketAt = iota
	atAddress               // bound to the packet's destination
	atAllAddresses          // bound to all addresses
)

// DialSockets opens the connection to the network namespace behind the descriptor netns, or
// to the calling thread's own if that is 0. It looks up a socket of its own to see whether
// the kernel finds sockets; otherwise the error is ErrNoUDPDiag.
func DialSockets(netns int) (*Sockets, error) {
	c, err := dial(unix.NETLINK_SOCK_DIAG, netns)
	if err != nil {
		return nil, err
	}
	s := &Sockets{conn: c, links: []uint32{0}}
	s.find = func(b []byte) error {
		if len(b) < sizeofInetDiagMsg {
			return nfnl.ErrMalformed
		}
		s.found = atAddress
		if e := endpointOf(b); e.Addr == any4 || e.Addr == any6 {
			s.found = atAllAddresses
		}
		return nil
	}
	if err := s.probe(netns); err != nil {
		_ = s.Close()
		return nil, err
	}
	return s, nil
}

// Close ends the connection.
func (s *Sockets) Close() error { return s.conn.Close() }

// SetNetwork sets which links are outside links. A socket that is bound to a device counts
// if the device is one of them, or a VRF: packets that come in by a link of a VRF reach the
// sockets bound to the VRF. Before the first call no such socket counts.
func (s *Sockets) SetNetwork(n Network) {
	s.links = s.links[:0]
	for _, l := range n.Links {
		if l.Outside != 0 || l.Kind == "vrf" {
			s.links = append(s.links, uint32(l.Index))
		}
	}
	if len(s.links) == 0 {
		s.links = append(s.links, 0)
	}
}

func (s *Sockets) hears(link uint32) bool { return slices.Contains(s.links, link) }

// Serves reports whether a local socket gets what peer sends to ext, from any port, if it
// comes in by an outside link. It costs a few microseconds for each outside link and does
// not allocate.
//
// Connected sockets are not found, whatever their peer: a permission takes the packets of
// one only after conntrack has forgotten its flow. Ports finds them.
func (s *Sockets) Serves(ext cone.Endpoint, peer cone.Addr) (bool, error) {
	for _, link := range s.links {
		if at, err := s.lookUp(ext, peer, link); at != nowhere || err != nil {
			return at != nowhere, err
		}
	}
	return false, nil
}

// Takes reports whether a local socket would lose what peer sends to ext if that were led
// to in, which is an address of the gateway too. A socket that is bound to all addresses
// gets it there as well.
func (s *Sockets) Takes(ext, in cone.Endpoint, peer cone.Addr) (bool, error) {
	if ext == in {
		return false, nil
	}
	for _, link := range s.links {
		from, err := s.lookUp(ext, peer, link)
		if err != nil {
			return false, err
		}
		if from == nowhere {
			continue
		}
		to, err := s.lookUp(in, peer, link)
		if err != nil {
			return false, err
		}
		if ext.Port != in.Port || from != atAllAddresses || to != atAllAddresses {
			return true, nil
		}
	}
	return false, nil
}

// lookUp finds the socket that gets a packet that peer sends to ext and that comes in by
// link.
func (s *Sockets) lookUp(ext cone.Endpoint, peer cone.Addr, link uint32) (socketAt, error) {
	// udp_dump_one looks for the receiver of a packet from src to dst, so these fields are
	// the other way round than elsewhere. All kernels do so; probe would notice one that
	// does not. A source port of 0 excludes connected sockets.
	family, from, to := byte(unix.AF_INET6), peer[:], ext.Addr[:]
	if ext.Addr.Is4() {
		family, from, to = unix.AF_INET, from[12:], to[12:]
	}
	req := s.conn.begin(unix.SOCK_DIAG_BY_FAMILY, 0, diagSize)
	diagRequest(req, family)
	binary.BigEndian.PutUint16(req[diagDport:], ext.Port)
	copy(req[diagSrc:], from)
	copy(req[diagDst:], to)
	binary.NativeEndian.PutUint32(req[diagIf:], link)
	s.found = nowhere
	if err := s.conn.exchange(s.find); err != nil && !errors.Is(err, unix.ENOENT) {
		return nowhere, fmt.Errorf("look up UDP socket: %w", err)
	}
	return s.found, nil
}

// probe looks up a socket that exists: a kernel without udp_diag answers as it does for a
// missing socket. If the gateway has no port for that, it reads all sockets, which such a
// kernel refuses (__inet_diag_dump).
func (s *Sockets) probe(netns int) error {
	u, err := socket.Socket(unix.AF_INET, unix.SOCK_DGRAM, 0, "probe", &socket.Config{NetNS: netns})
	if err != nil {
		return fmt.Errorf("open UDP socket: %w", err)
	}
	defer func() { _ = u.Close() }()
	switch err := u.Bind(&unix.SockaddrInet4{}); {
	case errors.Is(err, unix.EADDRINUSE):
		if _, err := s.Ports(); errors.Is(err, unix.ENOENT) {
			return ErrNoUDPDiag
		} else if err != nil {
			return err
		}
		return nil
	case err != nil:
		return fmt.Errorf("bind UDP socket: %w", err)
	}
	addr, err := u.Getsockname()
	if err != nil {
		return fmt.Errorf("get port of UDP socket: %w", err)
	}
	own := cone.Endpoint{Addr: cone.AddrFrom4([4]byte{127, 0, 0, 1})}
	if a, ok := addr.(*unix.SockaddrInet4); ok {
		own.Port = uint16(a.Port)
	}
	found, err := s.Serves(own, own.Addr)
	if err == nil && !found {
		err = ErrNoUDPDiag
	}
	return err
}

// Offsets in a struct inet_diag_req_v2.
const (
	diagFamily   = 0
	diagProtocol = 1
	diagStates   = 4
	diagDport    = 10
	diagSrc      = 12
	diagDst      = 28
	diagIf       = 44
	diagCookie   = 48
	diagSize     = 56
)

// diagRequest fills in what all requests for UDP sockets have in common.
func diagRequest(b []byte, family byte) {
	b[diagFamily], b[diagProtocol] = family, unix.IPPROTO_UDP
	// UDP sockets have two of TCP's states: ESTABLISHED if connected, else CLOSE. Only
	// dumps use this field.
	binary.NativeEndian.PutUint32(b[diagStates:], 1<<unix.BPF_TCP_ESTABLISHED|1<<unix.BPF_TCP_CLOSE)
	for i := diagCookie; i < len(b); i++ {
		b[i] = 0xff // INET_DIAG_NOCOOKIE
	}
}
