package rules_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// A flood sends packets through the gateway. The links of a lab keep no packets
// (see lab.Lost): the kernel takes one through the gateway to the host on the other
// side before the system call that sent it goes on. So the CPU time of the sending
// thread is what the packet costs.
type flood struct {
	*lab.Lab
	fd       int
	sink     *lab.Host
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
	atOnce    = 1024 // messages that sendmmsg takes
)

// newFlood prepares n packets that go in, or out. The receiving host counts what
// comes and takes it no further, so that nobody has to empty a socket.
func newFlood(tb testing.TB, l *lab.Lab, n int, out bool) *flood {
	tb.Helper()
	source, sink, link := l.Outside, l.Inside(0), "wan0"
	if out {
		source, sink, link = l.Inside(0), l.Outside, "lan0"
	}
	f := &flood{Lab: l, sink: sink, packets: make([][packetLen]byte, n), vectors: make([]unix.Iovec, n), messages: make([]message, n)}
	var from, to *net.Interface
	must(tb, l.Gateway.Do(func() (err error) {
		to, err = net.InterfaceByName(link)
		return err
	}))
	must(tb, source.Do(func() (err error) {
		if from, err = net.InterfaceByName("eth0"); err != nil {
			return err
		}
		if f.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
			return err
		}
		return unix.Bind(f.fd, &unix.SockaddrLinklayer{Ifindex: from.Index})
	}))
	tb.Cleanup(func() { must(tb, unix.Close(f.fd)) })
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
	_, err := sink.Output("nft", `table ip sink { counter came { }; chain c {
		type filter hook prerouting priority raw; meta l4proto udp counter name came drop; }; }`)
	must(tb, err)
	return f
}

// aim gives packet i its endpoints and checksums.
func (f *flood) aim(i int, from, to netip.AddrPort) {
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

// send sends the packets from first to last and returns the CPU time that this
// took. The thread must be bound to one CPU.
func (f *flood) send(tb testing.TB, first, last int) time.Duration {
	tb.Helper()
	began := threadTime(tb)
	for at := first; at < last; {
		n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(f.fd),
			uintptr(unsafe.Pointer(&f.messages[at])), uintptr(min(atOnce, last-at)), 0, 0, 0)
		if errno != 0 {
			tb.Fatalf("send packets: %v", errno)
		}
		at += int(n)
	}
	return threadTime(tb) - began
}

// came returns how many packets have come to the host since the last call.
func (f *flood) came(tb testing.TB) int {
	tb.Helper()
	out, err := f.sink.Output("nft", "reset", "counter", "ip", "sink", "came")
	must(tb, err)
	_, rest, _ := strings.Cut(out, "packets ")
	digits, _, _ := strings.Cut(rest, " ")
	n, err := strconv.Atoi(digits)
	must(tb, err)
	return n
}

// A listener gets the gateway's events of new flows, as conenatd does.
type listener int

func listenForEvents(tb testing.TB, l *lab.Lab) listener {
	tb.Helper()
	var fd int
	must(tb, l.Gateway.Do(func() (err error) {
		if fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_NETFILTER); err != nil {
			return err
		}
		const newFlows, room = 1 << 0, 64 << 20
		return errors.Join(
			unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room),
			unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: newFlows}))
	}))
	tb.Cleanup(func() { must(tb, unix.Close(fd)) })
	return listener(fd)
}

// empty reads what has come and returns how many events that is.
func (l listener) empty() (n int) {
	var b [1 << 12]byte
	for ; ; n++ {
		if _, err := unix.Read(int(l), b[:]); err != nil {
			return n
		}
	}
}

func threadTime(tb testing.TB) time.Duration {
	tb.Helper()
	var t unix.Timespec
	must(tb, unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t))
	return time.Duration(t.Nano())
}

// onOneCPU binds the goroutine to its thread, and that to a CPU, until the
// benchmark ends: the last CPU, for the first serves most interrupts.
func onOneCPU(tb testing.TB) {
	tb.Helper()
	runtime.LockOSThread()
	var allowed, last unix.CPUSet
	must(tb, unix.SchedGetaffinity(0, &allowed))
	for cpu := 8*int(unsafe.Sizeof(allowed)) - 1; last.Count() == 0; cpu-- {
		if allowed.IsSet(cpu) {
			last.Set(cpu)
		}
	}
	must(tb, unix.SchedSetaffinity(0, &last))
	tb.Cleanup(func() {
		must(tb, unix.SchedSetaffinity(0, &allowed))
		runtime.UnlockOSThread()
	})
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}
