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
func (s *stage) icmp() (verdict, string, error) {
	device, proxy, _, _, err := s.cast()
	if err != nil {
		return fail, "", err
	}
	ext, err := device.Contact(proxy)
	if err != nil {
		return fail, "", err
	}
	var c net.Conn
	err = s.Inside(0).Do(func() error {
		c, err = net.Dial("udp", netip.AddrPortFrom(lab.PeerA, 9).String())
		return err
	})
	if err != nil {
		return fail, "", err
	}
	defer c.Close()
	if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return fail, "", err
	}
	if _, err := c.Write([]byte("nobody listens")); err != nil {
		return fail, "", err
	}
	_, err = c.Read(make([]byte, 1))
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fail, fmt.Sprintf("no ICMP error came in: %v", err), nil
	}
	if err := lab.Arrives(device, lab.Packet{From: proxy, To: ext, Payload: "after the error"}); err != nil {
		return fail, "the mapping ended with the error", nil
	}
	return pass, "an ICMP error came in, and the mapping works on", nil
}

const large = 1200 // bytes; the link takes 1000

// fragmentsOut sends a packet that the outside link cannot take unfragmented.
func (s *stage) fragmentsOut() (verdict, string, error) {
	device, proxy, _, _, err := s.cast()
	if err != nil {
		return fail, "", err
	}
	if _, err := s.Gateway.Output("ip", "link", "set", "wan0", "mtu", "1000"); err != nil {
		return fail, "", err
	}
	payload := strings.Repeat("x", large)
	discover := func(how int) error {
		raw, err := device.SyscallConn()
		if err != nil {
			return err
		}
		var failed error
		err = raw.Control(func(fd uintptr) {
			failed = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_MTU_DISCOVER, how)
		})
		return errors.Join(err, failed)
	}
	if err := discover(unix.IP_PMTUDISC_DO); err != nil { // sets "don't fragment"
		return fail, "", err
	}
	if err := device.Send(proxy.Addr(), payload); err != nil {
		return fail, "", err
	}
	// The ICMP error came before Send returned, so the next packet is refused
	// locally.
	if err := device.Send(proxy.Addr(), payload); !errors.Is(err, unix.EMSGSIZE) {
		return fail, fmt.Sprintf("no ICMP error about a packet that is too large: %v", err), nil
	}
	if err := discover(unix.IP_PMTUDISC_DONT); err != nil {
		return fail, "", err
	}
	if err := device.Send(proxy.Addr(), payload); err != nil {
		return fail, "", err
	}
	if _, err := proxy.Expect(payload); err != nil {
		return fail, oneLine(err), nil
	}
	return pass, "too large: ICMP error with DF, fragments without", nil
}

// fragmentsIn lets the peer send a packet in two fragments, in both orders.
func (s *stage) fragmentsIn() (verdict, string, error) {
	device, proxy, _, _, err := s.cast()
	if err != nil {
		return fail, "", err
	}
	ext, err := device.Contact(proxy)
	if err != nil {
		return fail, "", err
	}
	for i, order := range [][2]int{{0, 1}, {1, 0}} {
		payload := strings.Repeat(string(rune('a'+i)), large)
		if err := s.sendFragments(uint16(1+i), proxy.Addr(), ext, payload, order); err != nil {
			return fail, "", err
		}
		if _, err := device.Expect(payload); err != nil {
			return fail, oneLine(err), nil
		}
	}
	return pass, "both orders arrive", nil
}

// sendFragments sends a UDP packet in two fragments from the outside (RFC 791).
func (s *stage) sendFragments(id uint16, from, to netip.AddrPort, payload string, order [2]int) error {
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
	return s.Outside.Do(func() error {
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
	})
}

// cast6 is cast for IPv6; the device has contacted its proxy.
func (s *stage) cast6() (device, proxy, other, stranger *lab.Socket, ext netip.AddrPort, err error) {
	in, err := s.open(s.Inside(0), s.Inside(0).Addr6, 5060)
	if err != nil {
		return
	}
	out, err := s.open(s.Outside, lab.Peer6A, 5060, 5070)
	if err != nil {
		return
	}
	strange, err := s.open(s.Outside, lab.Peer6B, 5060)
	if err != nil {
		return
	}
	ext, err = in[0].Contact(out[0])
	return in[0], out[0], out[1], strange[0], ext, err
}

func (s *stage) filtering6() (verdict, string, error) {
	device, _, other, stranger, ext, err := s.cast6()
	if err != nil {
		return fail, "", err
	}
	return s.filters(device, other, stranger, ext)
}

func (s *stage) timer6() (verdict, string, error) {
	device, proxy, _, _, ext, err := s.cast6()
	if err != nil {
		return fail, "", err
	}
	return s.outlives(device, proxy, ext)
}
