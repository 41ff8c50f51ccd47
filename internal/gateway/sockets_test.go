package gateway

import (
	"errors"
	"fmt"
	"maps"
	"net"
	"syscall"
	"testing"

	"github.com/mdlayher/socket"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
)

// Addresses of the gateway.
const (
	ext4   = "198.51.100.1"
	other4 = "10.47.11.1"
	ext6   = "[2001:db8:ffff::1]"
)

var peer4, peer6 = cone.AddrFrom(lab.PeerA), cone.AddrFrom(lab.Peer6A)

// at returns the addresses at which ask finds the port served.
func at(port int, ask func(cone.Endpoint) bool) (found string) {
	for _, a := range []string{ext4, other4, ext6} {
		if ask(endpoint(fmt.Sprintf("%s:%d", a, port))) {
			found += " " + a
		}
	}
	return found
}

func serves(t testing.TB, s *Sockets, port int) string {
	return at(port, func(ext cone.Endpoint) bool {
		peer := peer6
		if ext.Addr.Is4() {
			peer = peer4
		}
		ok, err := s.Serves(ext, peer)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	})
}

func portsServe(t testing.TB, s *Sockets, port int) string {
	p, err := s.Ports()
	if err != nil {
		t.Fatal(err)
	}
	return at(port, p.Serves)
}

func TestSocketsAreFoundWhereTheyServe(t *testing.T) {
	const all4, all = " " + ext4 + " " + other4, " " + ext4 + " " + other4 + " " + ext6
	g := newGateway(t, "link add docker0 type bridge", "address add 172.17.0.1/16 dev docker0", "link set docker0 up",
		"link add wan1 type bridge", "link set wan1 up", "route add default dev wan1 metric 7")
	s := dialSockets(t, g)
	s.SetNetwork(readNetwork(t, g))
	tests := []struct {
		name, network, addr string
		set                 control
		serves              string
	}{
		{"IPv4 wildcard", "udp4", "0.0.0.0", nil, all4},
		{"IPv4 address", "udp4", ext4, nil, " " + ext4},
		{"other IPv4 address", "udp4", other4, nil, " " + other4},
		{"address of containers", "udp4", "172.17.0.1", nil, ""},
		{"loopback", "udp4", "127.0.0.1", nil, ""},
		{"transparent proxy", "udp4", "203.0.113.99", transparent, ""},
		{"dual stack", "udp", "[::]", nil, all},
		{"IPv6 only", "udp6", "[::]", nil, " " + ext6},
		{"IPv6 address", "udp6", ext6, nil, " " + ext6},
		{"reusable port", "udp4", ext4, reusePort, " " + ext4},
		{"outside link", "udp4", "0.0.0.0", onDevice("wan0"), all4},
		{"outside link, dual stack", "udp", "[::]", onDevice("wan0"), all},
		{"second outside link", "udp4", "0.0.0.0", onDevice("wan1"), all4},
		{"inside link", "udp4", "0.0.0.0", onDevice("lan0"), ""},
		{"inside link, dual stack", "udp", "[::]", onDevice("lan0"), ""},
		{"inside link, outside address", "udp4", ext4, onDevice("docker0"), ""},
	}
	for i, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			port := 5060 + i
			c := listen(t, g, test.network, fmt.Sprintf("%s:%d", test.addr, port), test.set)
			if got := serves(t, s, port); got != test.serves {
				t.Errorf("Serves says%s; want%s", got, test.serves)
			}
			if got := portsServe(t, s, port); got != test.serves {
				t.Errorf("Ports says%s; want%s", got, test.serves)
			}
			if err := c.Close(); err != nil {
				t.Fatal(err)
			}
			if got := serves(t, s, port) + portsServe(t, s, port); got != "" {
				t.Errorf("closed, and yet serves%s", got)
			}
		})
	}
}

func TestIPv6SocketOnMappedAddressServesIPv4(t *testing.T) {
	g := newGateway(t)
	s := dialSockets(t, g)
	u, err := socket.Socket(unix.AF_INET6, unix.SOCK_DGRAM, 0, "mapped", &socket.Config{NetNS: g.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	if err := u.Bind(&unix.SockaddrInet6{Addr: addr(ext4), Port: 5060}); err != nil {
		t.Fatal(err)
	}
	if got := serves(t, s, 5060); got != " "+ext4 {
		t.Errorf("Serves says%s", got)
	}
	if got := portsServe(t, s, 5060); got != " "+ext4 {
		t.Errorf("Ports says%s", got)
	}
}

// A group that shares a port has members to pick from; it serves while there is
// one.
func TestReusedPortServesUntilTheLastIsClosed(t *testing.T) {
	g := newGateway(t)
	s := dialSockets(t, g)
	a, b := listen(t, g, "udp4", ext4+":5060", reusePort), listen(t, g, "udp4", ext4+":5060", reusePort)
	for _, closing := range []net.PacketConn{a, b} {
		if got := serves(t, s, 5060); got != " "+ext4 {
			t.Errorf("Serves says%s", got)
		}
		if err := closing.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if got := serves(t, s, 5060); got != "" {
		t.Errorf("closed, and yet serves%s", got)
	}
}

// The gateway's own resolver holds such a socket for each query.
func TestConnectedSocketsServeNobodyElse(t *testing.T) {
	g := newGateway(t)
	s := dialSockets(t, g)
	connect(t, g, ext4+":5060", "203.0.113.9:53")
	connect(t, g, ext6+":5060", "[2001:db8:5::9]:53")
	if got := serves(t, s, 5060) + portsServe(t, s, 5060); got != "" {
		t.Errorf("serves%s", got)
	}
	first, err := s.Ports()
	if err != nil {
		t.Fatal(err)
	}
	want := map[cone.Key]struct{}{
		{Ext: endpoint(ext4 + ":5060"), Peer: addr("203.0.113.9")}:   {},
		{Ext: endpoint(ext6 + ":5060"), Peer: addr("2001:db8:5::9")}: {},
	}
	if got := first.Connected(); !maps.Equal(got, want) {
		t.Errorf("connected: %v, want %v", got, want)
	}
	connect(t, g, ext4+":5061", "203.0.113.9:53")
	second, err := s.Ports()
	if err != nil {
		t.Fatal(err)
	}
	if got := second.Stay(first).Connected(); !maps.Equal(got, want) || second.Equal(first) {
		t.Errorf("connected at both looks: %v, want %v", got, want)
	}
}

func TestKernelThatFindsNothingIsNoticed(t *testing.T) {
	s := dialSockets(t, newGateway(t))
	// The kernel does not find a probe socket in another namespace.
	if err := s.probe(newGateway(t).FD()); !errors.Is(err, ErrNoUDPDiag) {
		t.Errorf("got %v", err)
	}
}

// A busy resolver may hold all local ports for a moment, or the user may have reserved them.
func TestSocketsAreFoundWhereNoLocalPortIsFree(t *testing.T) {
	for name, reserved := range map[string]string{"in use": "", "reserved": "40000-40001"} {
		t.Run(name, func(t *testing.T) {
			g := newGateway(t)
			for _, setting := range []string{"port_range=40000 40001", "reserved_ports=" + reserved} {
				if _, err := g.Output("sysctl", "-w", "net.ipv4.ip_local_"+setting); err != nil {
					t.Fatal(err)
				}
			}
			listen(t, g, "udp4", ":40000", nil)
			listen(t, g, "udp4", ":40001", nil)
			if got := serves(t, dialSockets(t, g), 40001); got != " "+ext4+" "+other4 {
				t.Errorf("port 40001 is served at%s", got)
			}
		})
	}
}

// What comes in by a link of a VRF reaches the sockets that are bound to the VRF.
func TestSocketsOfVRFsCount(t *testing.T) {
	var s Sockets
	s.SetNetwork(Network{Links: []Link{{Index: 2, Name: "lan0"}, {Index: 3, Name: "wan0", Outside: bothFamilies}, {Index: 4, Kind: "vrf"}}})
	for link, want := range map[uint32]bool{2: false, 3: true, 4: true} {
		if s.hears(link) != want {
			t.Errorf("a socket on link %d counts: %v", link, !want)
		}
	}
}

func TestSocketsThatStayAreToldFromThoseThatComeAndGo(t *testing.T) {
	g := newGateway(t)
	s := dialSockets(t, g)
	ports := func() *PortSet {
		p, err := s.Ports()
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	listen(t, g, "udp4", "0.0.0.0:5060", nil)
	brief := listen(t, g, "udp4", "0.0.0.0:5061", nil)
	first := ports()
	if err := brief.Close(); err != nil {
		t.Fatal(err)
	}
	listen(t, g, "udp4", "0.0.0.0:5062", nil)
	second := ports()
	stay := second.Stay(first)
	for port, want := range map[int]bool{5060: true, 5061: false, 5062: false} {
		if got := stay.Serves(endpoint(fmt.Sprintf("%s:%d", ext4, port))); got != want {
			t.Errorf("port %d: %v", port, got)
		}
	}
	if stay.Equal(second) || !ports().Stay(second).Equal(second) {
		t.Error("two looks at the same sockets differ, or two at others are equal")
	}
}

func TestServesDoesNotAllocate(t *testing.T) {
	g := newGateway(t)
	s := dialSockets(t, g)
	s.SetNetwork(readNetwork(t, g))
	listen(t, g, "udp4", "0.0.0.0:5060", nil)
	for _, ext := range []string{ext4 + ":5060", ext4 + ":5061", ext6 + ":5060"} {
		e := endpoint(ext)
		if n := testing.AllocsPerRun(100, func() {
			if _, err := s.Serves(e, peer4); err != nil {
				t.Fatal(err)
			}
		}); n != 0 {
			t.Errorf("%s: %v allocations", ext, n)
		}
	}
}

func TestErrorsAfterClose(t *testing.T) {
	s := dialSockets(t, newGateway(t))
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if ok, err := s.Serves(endpoint(ext4+":5060"), peer4); ok || err == nil {
		t.Errorf("Serves = %v, %v", ok, err)
	}
	if p, err := s.Ports(); p != nil || err == nil {
		t.Errorf("Ports = %v, %v", p, err)
	}
}

func BenchmarkServes(b *testing.B) {
	g := newGateway(b)
	s := dialSockets(b, g)
	listen(b, g, "udp", "[::]:5060", nil)
	for _, ext := range []string{ext4 + ":5060", ext4 + ":5061", ext6 + ":5060"} {
		b.Run(ext, func(b *testing.B) {
			e := endpoint(ext)
			b.ReportAllocs()
			for b.Loop() {
				if _, err := s.Serves(e, peer4); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

func BenchmarkPortsOf10000Sockets(b *testing.B) {
	g := newGateway(b)
	s := dialSockets(b, g)
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil || limit.Cur < 11_000 {
		b.Skipf("needs 11,000 file descriptors, may have %d (%v)", limit.Cur, err)
	}
	for port := range 10_000 {
		listen(b, g, "udp4", fmt.Sprintf("%s:%d", ext4, 10_000+port), nil)
	}
	b.ReportAllocs()
	for b.Loop() {
		p, err := s.Ports()
		if err != nil || len(p.bound) != 10_000 {
			b.Fatal(len(p.bound), err)
		}
	}
}

// Packets for one address of the gateway are led to another one.
//
// Fails when a socket for all addresses prevents that, and when a socket that gets nothing
// there does not.
func TestSocketsLosePacketsThatAreLedToOthers(t *testing.T) {
	tests := []struct {
		name   string
		listen []string // of the port 5060, with SO_REUSEPORT
		in     string
		takes  bool
	}{
		{"no socket", nil, other4 + ":5060", false},
		{"for all addresses", []string{"0.0.0.0"}, other4 + ":5060", false},
		{"two of them", []string{"0.0.0.0", "0.0.0.0"}, other4 + ":5060", false},
		{"of both families", []string{"[::]"}, other4 + ":5060", false},
		{"another port", []string{"0.0.0.0"}, other4 + ":5061", true},
		{"where it is sent", []string{ext4}, other4 + ":5060", true},
		{"where it is led", []string{other4}, other4 + ":5060", false},
		{"one for each", []string{ext4, other4}, other4 + ":5060", true},
		{"for all, and where it is sent", []string{"0.0.0.0", ext4}, other4 + ":5060", true},
		{"for all, and where it is led", []string{"0.0.0.0", other4}, other4 + ":5060", true},
		{"nowhere else", []string{ext4}, ext4 + ":5060", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			g := newGateway(t)
			s := dialSockets(t, g)
			for _, a := range test.listen {
				listen(t, g, "udp", a+":5060", reusePort)
			}
			got, err := s.Takes(endpoint(ext4+":5060"), endpoint(test.in), peer4)
			if err != nil || got != test.takes {
				t.Errorf("Sockets say %v, %v; want %v", got, err, test.takes)
			}
			p, err := s.Ports()
			if err != nil {
				t.Fatal(err)
			}
			if got := p.Takes(endpoint(ext4+":5060"), endpoint(test.in)); got != test.takes {
				t.Errorf("Ports say %v; want %v", got, test.takes)
			}
		})
	}
}
