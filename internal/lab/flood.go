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
	packets  [][packetLen]byte
	vectors  []unix.Iovec
	messages []message
}

// A message is the mmsghdr of sendmmsg(2).
type message struct {
	unix.Msghdr
	_ uint32
}

const (
	ipAt      = 14 // in an Ethernet frame
	udpAt     = ipAt + 20
	payload   = "a packet of a game or of a call"
	packetLen = udpAt + 8 + len(payload)
	atOnce    = 1024 // the most messages for one sendmmsg
)

// NewFlood prepares n packets: with out from the first inside host, otherwise from
// the outside host. Aim each packet before you send it.
func (l *Lab) NewFlood(n int, out bool) (*Flood, error) {
	source, link := l.Outside, outsideSegment.link
	if out {
		source, link = l.Inside(0), insideSegment.link
	}
	f := &Flood{packets: make([][packetLen]byte, n), vectors: make([]unix.Iovec, n), messages: make([]message, n)}
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
		p := f.packets[i][:]
		copy(p, to.HardwareAddr)
		copy(p[6:], from.HardwareAddr)
		binary.BigEndian.PutUint16(p[12:], unix.ETH_P_IP)
		p[ipAt], p[ipAt+8], p[ipAt+9] = 4<<4|5, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(p[ipAt+2:], uint16(packetLen-ipAt))
		binary.BigEndian.PutUint16(p[udpAt+4:], uint16(packetLen-udpAt))
		copy(p[udpAt+8:], payload)
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
	ip, udp := f.packets[i][ipAt:udpAt], f.packets[i][udpAt:]
	src, dst := from.Addr().As4(), to.Addr().As4()
	copy(ip[12:], src[:])
	copy(ip[16:], dst[:])
	binary.BigEndian.PutUint16(udp, from.Port())
	binary.BigEndian.PutUint16(udp[2:], to.Port())
	const ipSum, udpSum = 10, 6
	clear(ip[ipSum : ipSum+2])
	clear(udp[udpSum : udpSum+2])
	binary.BigEndian.PutUint16(ip[ipSum:], ^sum(0, ip))
	pseudoHeader := sum(unix.IPPROTO_UDP+uint32(len(udp)), ip[12:])
	binary.BigEndian.PutUint16(udp[udpSum:], ^sum(uint32(pseudoHeader), udp))
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
