package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
)

// The minimal loop is the yardstick of table d: the smallest program that lets a peer answer
// from another port. For each event of its one host and peer it sends one message, an
// expectation on an anchor made before. It has no lifetime, no limits, and checks neither
// sockets nor conflicts. It runs as its own process, like the daemon.

// minimalEnv makes this program the minimal loop.
const minimalEnv = "CONENATD_BENCH_MINIMAL"

// minimalPeer and minimalHost are the only hosts that the loop serves.
var (
	minimalPeer = cone.AddrFrom(lab.PeerA)
	minimalHost = cone.AddrFrom(netip.MustParseAddr("10.47.11.109"))
)

// minimalLoop runs until SIGTERM.
func minimalLoop() error {
	w, err := ctwatch.Dial(ctwatch.Config{ReadBuffer: eventRoom})
	if err != nil {
		return err
	}
	defer func() { _ = w.Close() }()
	s, err := newMinimalSender()
	if err != nil {
		return err
	}
	defer func() { _ = s.c.Close() }()
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM)
	go func() {
		<-stop
		_ = w.Close()
	}()
	if err := sayReady(); err != nil {
		return err
	}
	events := make([]ctwatch.Event, 64)
	for {
		n, err := w.Read(events)
		if err != nil {
			return nil // it was closed
		}
		for _, e := range events[:n] {
			if e.Kind != ctwatch.New || e.Flow.Src.Addr != minimalHost || e.Flow.Dst.Addr != minimalPeer {
				continue
			}
			if err := s.send(e.Flow.Src.Port, e.Flow.ReplyDst.Port); err != nil {
				return err
			}
		}
	}
}

func sayReady() error {
	c, err := net.Dial("unixgram", os.Getenv("NOTIFY_SOCKET"))
	if err != nil {
		return err
	}
	defer func() { _ = c.Close() }()
	_, err = c.Write([]byte("READY=1"))
	return err
}

// A minimalSender has one prepared message; only its ports change.
type minimalSender struct {
	c        *netlink.Conn
	raw      syscall.RawConn
	msg      []byte
	ext, nat int // offsets of the ports
	ack      [4096]byte
	err      error
	write    func(fd uintptr) bool
	read     func(fd uintptr) bool
}

// newMinimalSender makes the anchor, as conenatd does, and the message.
func newMinimalSender() (*minimalSender, error) {
	b, err := expect.Open(expect.Config{Lifetime: time.Hour})
	if err != nil {
		return nil, err
	}
	p := cone.Permission{
		Key: cone.Key{
			Ext:  cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:9")),
			Peer: minimalPeer,
		},
		Int: cone.Endpoint{Addr: minimalHost, Port: 9},
	}
	b.Grant([]cone.Permission{p}, func(_ int, r cone.Reason, e error) { err = fmt.Errorf("%v: %w", r, e) })
	if err != nil {
		return nil, err
	}
	s := &minimalSender{}
	if err := s.encode(); err != nil {
		return nil, err
	}
	if s.c, err = netlink.Dial(unix.NETLINK_NETFILTER, nil); err != nil {
		return nil, err
	}
	if s.raw, err = s.c.SyscallConn(); err != nil {
		return nil, err
	}
	to := &unix.SockaddrNetlink{Family: unix.AF_NETLINK}
	s.write = func(fd uintptr) bool {
		s.err = unix.Sendto(int(fd), s.msg, 0, to)
		return true
	}
	s.read = func(fd uintptr) bool {
		_, _, s.err = unix.Recvfrom(int(fd), s.ack[:], 0)
		return s.err != unix.EAGAIN
	}
	return s, nil
}

// encode makes the message: IPCTNL_MSG_EXP_NEW, acknowledged.
func (s *minimalSender) encode() error {
	host, peer, gateway := minimalHost, minimalPeer, cone.AddrFrom(netip.MustParseAddr("198.51.100.1"))
	const extPort, natPort = 0xfaf1, 0xfaf2 // values to search for in the message
	tuple := func(src, dst cone.Addr, sport, dport uint16) func(*netlink.AttributeEncoder) error {
		return func(e *netlink.AttributeEncoder) error {
			e.Nested(1, func(e *netlink.AttributeEncoder) error { // CTA_TUPLE_IP
				e.Bytes(1, src[12:])
				e.Bytes(2, dst[12:])
				return nil
			})
			e.Nested(2, func(e *netlink.AttributeEncoder) error { // CTA_TUPLE_PROTO
				e.ByteOrder = binary.BigEndian
				e.Uint8(1, unix.IPPROTO_UDP)
				e.Uint16(2, sport)
				e.Uint16(3, dport)
				return nil
			})
			return nil
		}
	}
	ones := cone.Addr{12: 0xff, 13: 0xff, 14: 0xff, 15: 0xff}
	e := netlink.NewAttributeEncoder()
	e.ByteOrder = binary.BigEndian
	e.Nested(1, tuple(host, peer, 0, 9))                   // CTA_EXPECT_MASTER: the anchor
	e.Nested(2, tuple(peer, gateway, 0, extPort))          // CTA_EXPECT_TUPLE
	e.Nested(3, tuple(ones, ones, 0, 0xffff))              // CTA_EXPECT_MASK
	e.Uint32(8, 1)                                         // CTA_EXPECT_FLAGS: NF_CT_EXPECT_PERMANENT
	e.Nested(10, func(e *netlink.AttributeEncoder) error { // CTA_EXPECT_NAT
		e.ByteOrder = binary.BigEndian
		e.Uint32(1, 1)
		e.Nested(2, tuple(host, cone.Addr{}, natPort, 0))
		return nil
	})
	e.Bytes(11, []byte("nat-follow-master\x00"))
	attrs, err := e.Encode()
	if err != nil {
		return err
	}
	m := netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_CTNETLINK_EXP << 8,
			Flags: netlink.Request | netlink.Create | netlink.Excl | netlink.Acknowledge,
		},
		Data: append([]byte{unix.AF_INET, 0, 0, 0}, attrs...),
	}
	m.Header.Length = uint32(16 + len(m.Data))
	if s.msg, err = m.MarshalBinary(); err != nil {
		return err
	}
	s.ext = bytes.Index(s.msg, []byte{extPort >> 8, extPort & 0xff})
	s.nat = bytes.Index(s.msg, []byte{natPort >> 8, natPort & 0xff})
	return nil
}

// send lets the peer answer to ext by sending to port of the host.
func (s *minimalSender) send(port, ext uint16) error {
	binary.BigEndian.PutUint16(s.msg[s.nat:], port)
	binary.BigEndian.PutUint16(s.msg[s.ext:], ext)
	if err := s.raw.Write(s.write); err != nil || s.err != nil {
		return errors.Join(err, s.err)
	}
	if err := s.raw.Read(s.read); err != nil || s.err != nil {
		return errors.Join(err, s.err)
	}
	if errno := int32(binary.NativeEndian.Uint32(s.ack[16:])); errno != 0 {
		return unix.Errno(-errno)
	}
	return nil
}
