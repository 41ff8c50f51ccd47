package ctwatch

import (
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// enterNetNS puts the calling test, which must not be parallel, into a fresh
// network namespace with lo up and connection tracking on. The thread is never
// unlocked, so the runtime throws it away with the test.
func enterNetNS(t testing.TB) {
	t.Helper()
	if os.Getenv("CONENATD_NO_LAB") != "" {
		t.Skip("it needs a network namespace, and CONENATD_NO_LAB is set")
	}
	skip := t.Skipf
	if os.Getenv("CI") != "" {
		skip = t.Fatalf
	}
	if os.Geteuid() != 0 {
		skip("needs root for a network namespace")
	}
	runtime.LockOSThread()
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		skip("make network namespace: %v", err)
	}
	if err := linkUp("lo"); err != nil {
		t.Fatalf("set lo up: %v", err)
	}
	// Without a rule that asks for it the kernel tracks nothing.
	nft(t, `table inet t { chain c { type filter hook output priority 0; ct state new counter; }; }`)
}

func linkUp(name string) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(fd) }()
	ifr, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, ifr)
}

func nft(t testing.TB, rules string) {
	t.Helper()
	cmd := exec.Command("nft", "-f", "-")
	cmd.Stdin = strings.NewReader(rules)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("nft: %v\n%s", err, out)
	}
}

func sysctl(t testing.TB, name, value string) {
	t.Helper()
	// /proc/sys/net is that of the thread.
	if err := os.WriteFile("/proc/sys/net/netfilter/"+name, []byte(value), 0); err != nil {
		t.Fatal(err)
	}
}

// a udpSock sends from one local endpoint to any.
type udpSock struct{ *net.UDPConn }

// listen opens a socket on addr, "127.0.0.1:0".
func listen(t testing.TB, addr string) udpSock {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(addr)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return udpSock{c}
}

func (s udpSock) endpoint() cone.Endpoint {
	ap := s.LocalAddr().(*net.UDPAddr).AddrPort()
	return cone.EndpointFrom(netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()))
}

func (s udpSock) send(t testing.TB, to cone.Endpoint, payload string) {
	t.Helper()
	if _, err := s.WriteToUDPAddrPort([]byte(payload), to.Netip()); err != nil {
		t.Fatal(err)
	}
}

func endpoint(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }

// within limits how long a test waits for what must come. Only a failing test waits that long.
const within = 30 * time.Second

func dialWatcher(t testing.TB, cfg Config) *Watcher {
	t.Helper()
	w, err := Dial(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	if err := w.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	return w
}

func dialQueries(t testing.TB, cfg Config) *Queries {
	t.Helper()
	q, err := DialQueries(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	return q
}

// readOne returns the next event.
func readOne(t testing.TB, w *Watcher) Event {
	t.Helper()
	events := make([]Event, 1)
	if _, err := w.Read(events); err != nil {
		t.Fatal(err)
	}
	return events[0]
}

// readQueued returns all events that are there now.
func readQueued(t testing.TB, w *Watcher) []Event {
	t.Helper()
	events := make([]Event, 1<<16)
	n, err := w.Read(events)
	if err != nil {
		t.Fatal(err)
	}
	return events[:n]
}

// dump returns the table by original source.
func dump(t testing.TB, q *Queries) map[cone.Endpoint]cone.Flow {
	t.Helper()
	flows := map[cone.Endpoint]cone.Flow{}
	if err := q.Dump(func(f *cone.Flow) { flows[f.Src] = *f }); err != nil {
		t.Fatal(err)
	}
	return flows
}
