package gateway

import (
	"context"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newGateway makes a gateway and runs ip(8) in it, a command for each line.
func newGateway(t testing.TB, commands ...string) *lab.Host {
	t.Helper()
	g := lab.ForTest(t, lab.Options{Guest: true, IPv6: true, Rules: lab.NoRules}).Gateway
	for _, c := range commands {
		ip(t, g, c)
	}
	return g
}

func ip(t testing.TB, g *lab.Host, command string) {
	t.Helper()
	if _, err := g.Output("ip", strings.Fields(command)...); err != nil {
		t.Fatal(err)
	}
}

func readNetwork(t testing.TB, g *lab.Host, outside ...string) Network {
	t.Helper()
	n, err := ReadNetwork(g.FD(), Sides{Outside: outside})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func dialSockets(t testing.TB, g *lab.Host) *Sockets {
	t.Helper()
	s, err := DialSockets(g.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// A control sets an option of a socket before it is bound.
type control func(fd int) error

func onDevice(name string) control {
	return func(fd int) error { return unix.BindToDevice(fd, name) }
}

func transparent(fd int) error { return unix.SetsockoptInt(fd, unix.SOL_IP, unix.IP_TRANSPARENT, 1) }

func reusePort(fd int) error {
	return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
}

// listen binds a socket in the gateway. The network "udp" with an IPv6 wildcard
// is dual-stack, "udp6" is not.
func listen(t testing.TB, g *lab.Host, network, addr string, set control) net.PacketConn {
	t.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		if set == nil {
			return nil
		}
		if e := rc.Control(func(fd uintptr) { err = set(int(fd)) }); e != nil {
			return e
		}
		return err
	}}
	var c net.PacketConn
	err := g.Do(func() (err error) {
		c, err = lc.ListenPacket(context.Background(), network, addr)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// connect binds a socket in the gateway and connects it.
func connect(t testing.TB, g *lab.Host, local, remote string) {
	t.Helper()
	var c net.Conn
	err := g.Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.UDPAddrFromAddrPort(netip.MustParseAddrPort(local))}
		c, err = d.Dial("udp", remote)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
}

func endpoint(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }

func addr(s string) cone.Addr { return cone.AddrFrom(netip.MustParseAddr(s)) }
