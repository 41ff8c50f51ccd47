package lab

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A Flood sends prepared packets through the gateway, with any source address. It
// must not be used concurrently.
//
// The links of a lab do not queue packets (see Lost): the kernel carries a packet
// through the gateway to the host on the other side before the system call that sent
// it returns.
type Flood struct {
	fd       int
	protocol byte
	packets  [][]byte
	vectors  []unix.Iovec
	messages []message
}

// A message is the mmsghdr of sendmmsg(2).
type message struct {
	unix.Msghdr
	_ uint32
}

// A Shape is what the packets of a flood look like.
type Shape struct {
	// Length is that of the IP packet in bytes. Zero means a UDP packet with a short payload,
	// or a TCP segment without one.
	Length int
	// TCP makes first packets of connections (SYN) instead of UDP packets.
	TCP bool
}

const (
	ipAt        = 14 // in an Ethernet frame
	transportAt = ipAt + 20
	udpHeader   = 8
	tcpHeader   = 20
	payload     = "a packet of a game or of a call"
	atOnce      = 1024 // the most messages for one sendmmsg
)

// NewFlood prepares n UDP packets: with out from the first inside host, otherwise from
// the outside host. Aim each packet before you send it.
func (l *Lab) NewFlood(n int, out bool) (*Flood, error) { return l.NewFloodOf(Shape{}, n, out) }

// NewFloodOf is NewFlood for packets of another shape.
func (l *Lab) NewFloodOf(shape Shape, n int, out bool) (*Flood, error) {
	f := &Flood{
		protocol: unix.IPPROTO_UDP, packets: make([][]byte, n), vectors: make([]unix.Iovec, n), messages: make([]message, n),
	}
	least, length := transportAt+udpHeader, transportAt+udpHeader+len(payload)
	if shape.TCP {
		f.protocol = unix.IPPROTO_TCP
		least = transportAt + tcpHeader
		length = least
	}
	if shape.Length != 0 {
		length = ipAt + shape.Length
	}
	if length < least || length > ipAt+1500 {
		return nil, fmt.Errorf("prepare flood: packets of %d bytes: want %d to 1500", shape.Length, least-ipAt)
	}
	source, link := l.Outside, outsideSegment.link
	if out {
		source, link = l.Inside(0), insideSegment.link
	}
	var from, to *net.Interface
	err := l.Gateway.Do(func() (err error) {
		to, err = net.InterfaceByName(link)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("prepare flood: %w", err)
	}
	err = source.Do(func() (err error) {
		if from, err = net.InterfaceByName("eth0"); err != nil {
			return err
		}
		f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		return unix.Bind(f.fd, &unix.SockaddrLinklayer{Ifindex: from.Index})
	})
	if err != nil {
		return nil, fmt.Errorf("prepare flood: %w", err)
	}
	for i := range f.packets {
		p := make([]byte, length)
		copy(p, to.HardwareAddr)
		copy(p[6:], from.HardwareAddr)
		binary.BigEndian.PutUint16(p[12:], unix.ETH_P_IP)
		p[ipAt], p[ipAt+8], p[ipAt+9] = 4<<4|5, 64, f.protocol
		binary.BigEndian.PutUint16(p[ipAt+2:], uint16(length-ipAt))
		if shape.TCP {
			const offset, syn, window = tcpHeader / 4 << 4, 1 << 1, 0xffff
			p[transportAt+12], p[transportAt+13] = offset, syn
			binary.BigEndian.PutUint16(p[transportAt+14:], window)
		} else {
			binary.BigEndian.PutUint16(p[transportAt+4:], uint16(length-transportAt))
			copy(p[transportAt+udpHeader:], payload)
		}
		f.packets[i] = p
		f.vectors[i].Base = &p[0]
		f.vectors[i].SetLen(len(p))
		f.messages[i].Iov = &f.vectors[i]
		f.messages[i].SetIovlen(1)
	}
	return f, nil
}

// Close ends the flood.
func (f *Flood) Close() error { return unix.Close(f.fd) }

// Len returns how many packets there are.
func (f *Flood) Len() int { return len(f.packets) }

// Aim gives packet i its endpoints and checksums.
func (f *Flood) Aim(i int, from, to netip.AddrPort) {
	ip, transport := f.packets[i][ipAt:transportAt], f.packets[i][transportAt:]
	src, dst := from.Addr().As4(), to.Addr().As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(transport, from.Port())
	binary.BigEndian.PutUint16(transport[2:], to.Port())
	const ipSum, udpSum, tcpSum = 10, 6, 16
	at := udpSum
	if f.protocol == unix.IPPROTO_TCP {
		at = tcpSum
	}
	clear(ip[ipSum : ipSum+2])
	clear(transport[at : at+2])
	binary.BigEndian.PutUint16(ip[ipSum:], ^sum(0, ip))
	pseudoHeader := sum(uint32(f.protocol)+uint32(len(transport)), ip[12:])
	binary.BigEndian.PutUint16(transport[at:], ^sum(uint32(pseudoHeader), transport))
}

// sum adds up b for a checksum (RFC 1071).
func sum(n uint32, b []byte) uint16 {
	for ; len(b) > 1; b = b[2:] {
		n += uint32(binary.BigEndian.Uint16(b))
	}
	if len(b) == 1 {
		n += uint32(b[0]) << 8
	}
	for n > 0xffff {
		n = n>>16 + n&0xffff
	}
	return uint16(n)
}

// Send sends the packets from first up to, but not including, last. It allocates
// nothing.
func (f *Flood) Send(first, last int) error {
	for at := first; at < last; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(f.fd),
			uintptr(unsafe.Pointer(&f.messages[at])), uintptr(min(atOnce, last-at)), 0, 0, 0)
		if errno != 0 {
			return fmt.Errorf("send packets: %w", errno)
		}
		at += int(n)
	}
	return nil
}
