package selftest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// icmp sends to a port on which nobody listens.
func (s *stage) icmp() (verdict, string) {
	c := s.cast()
	ext := c.contact()
	var closed net.Conn
	must(s.Inside(0).Do(func() (err error) {
		closed, err = net.Dial("udp", netip.AddrPortFrom(lab.PeerA, 9).String())
		return err
	}))
	defer closed.Close()
	must(closed.SetReadDeadline(time.Now().Add(10 * time.Second)))
	get(closed.Write([]byte("nobody listens")))
	if _, err := closed.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNREFUSED) {
		return fail, fmt.Sprintf("no ICMP error came in: %v", err)
	}
	if lab.Arrives(c.device, lab.Packet{From: c.proxy, To: ext, Payload: "after the error"}) != nil {
		return fail, "the mapping ended with the error"
	}
	return pass, "an ICMP error came in, and the mapping works on"
}

const large = 1200 // bytes; the link takes 1000

// fragmentsOut sends a packet that the outside link cannot take unfragmented.
func (s *stage) fragmentsOut() (verdict, string) {
	c := s.cast()
	get(s.Gateway.Output("ip", "link", "set", "wan0", "mtu", "1000"))
	payload := strings.Repeat("x", large)
	discover := func(how int) {
		var failed error
		err := get(c.device.SyscallConn()).Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, how)
		})
		must(errors.Join(err, failed))
	}
	discover(unix.IP_PMTUDISC_DO) // sets "don't fragment"
	must(c.device.Send(c.proxy.Addr(), payload))
	// The ICMP error came before Send returned, so the next packet is refused
	// locally.
	if err := c.device.Send(c.proxy.Addr(), payload); !errors.Is(err, unix.EMSGSIZE) {
		return fail, fmt.Sprintf("no ICMP error about a packet that is too large: %v", err)
	}
	discover(unix.IP_PMTUDISC_DONT)
	must(c.device.Send(c.proxy.Addr(), payload))
	if _, err := c.proxy.Expect(payload); err != nil {
		return fail, oneLine(err)
	}
	return pass, "too large: ICMP error with DF, fragments without"
}

// fragmentsIn lets the peer send a packet in two fragments, in both orders.
func (s *stage) fragmentsIn() (verdict, string) {
	c := s.cast()
	ext := c.contact()
	for i, order := range [][2]int{{0, 1}, {1, 0}} {
		payload := strings.Repeat(string(rune('a'+i)), large)
		s.sendFragments(uint16(1+i), c.proxy.Addr(), ext, payload, order)
		if _, err := c.device.Expect(payload); err != nil {
			return fail, oneLine(err)
		}
	}
	return pass, "both orders arrive"
}

// sendFragments sends a UDP packet in two fragments from the outside (RFC 791).
func (s *stage) sendFragments(id uint16, from, to netip.AddrPort, payload string, order [2]int) {
	udp := binary.BigEndian.AppendUint16(nil, from.Port())
	udp = binary.BigEndian.AppendUint16(udp, to.Port())
	udp = binary.BigEndian.AppendUint16(udp, uint16(8+len(payload)))
	udp = append(udp, 0, 0) // no checksum
	udp = append(udp, payload...)
	const cut, headerLen, more = 808, 20, 1 << 13
	src, dst := from.Addr().As4(), to.Addr().As4()
	fragment := func(n int) []byte {
		part, offset := udp[:cut], uint16(more)
		if n == 1 {
			part, offset = udp[cut:], cut/8
		}
		b := make([]byte, headerLen, headerLen+len(part))
		b[0], b[8], b[9] = 4<<4|headerLen/4, 64, unix.IPPROTO_UDP
		binary.BigEndian.PutUint16(b[2:], uint16(headerLen+len(part)))
		binary.BigEndian.PutUint16(b[4:], id)
		binary.BigEndian.PutUint16(b[6:], offset)
		copy(b[12:], src[:])
		copy(b[16:], dst[:])
		return append(b, part...) // the kernel adds the header's checksum
	}
	must(s.Outside.Do(func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		for _, n := range order {
			if err := unix.Sendto(fd, fragment(n), 0, &unix.SockaddrInet4{Addr: dst}); err != nil {
				return err
			}
		}
		return nil
	}))
}
