package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// The gateway's own sockets and local ports, and the ports left for hosts.

// sysctl sets a setting of the gateway.
func (s *scene) sysctl(key, value string) {
	s.T.Helper()
	_, err := s.Gateway.Output("sysctl", "-qw", key+"="+value)
	s.Must(err)
}

const localRange, reservedPorts = "net.ipv4.ip_local_port_range", "net.ipv4.ip_local_reserved_ports"

// Hosts on one source port get one outside port each, outside the range of local ports
// that the kernel gives to the gateway's own sockets, whatever that range is.
func TestNFTPoolFitsEveryRangeOfLocalPorts(t *testing.T) {
	for name, tc := range map[string]struct {
		local, reserved string
		first, last     uint16
	}{
		"one port of overlap":           {"32768 61000", "", 61001, 65535},
		"dynamic ports of IANA":         {"49152 65535", "", 44616, 49151},
		"all ports, the pool reserved":  {"1024 65535", "61000-65535", 61000, 65535},
		"all ports, another part is it": {"1024 65535", "20000-21999", 20000, 21999},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 3})
			s.sysctl(localRange, tc.local)
			s.sysctl(reservedPorts, tc.reserved)
			s.Serve(stage.Auto[0], mapped)
			hosts, exts := s.consoles(3)
			for i, ext := range exts {
				if i > 0 && (ext.Port() < tc.first || ext.Port() > tc.last) {
					t.Errorf("host %d leaves as %v", i, ext)
				}
				s.Arrives(hosts[i], s.PeerSocket(lab.PeerA, uint16(20_000+i)), ext)
			}
		})
	}
}

// If the local port range covers all ports, the start fails. The error names a sysctl line
// that makes room for a pool and keeps the ports that are reserved already.
func TestNFTErrorNamesTheLineThatMakesAPool(t *testing.T) {
	for _, pool := range []string{"61000-65535", "20000-29999"} {
		s := newScene(t, lab.Options{Inside: 2})
		s.sysctl(localRange, "1024 65535")
		s.sysctl(reservedPorts, "8080")
		out, code := s.CLI("run", "--subnet", lab.InsideNet.String(), mapped, "--port-pool", pool, "--control-socket", t.TempDir()+"/c.sock")
		line := regexp.MustCompile(`sysctl -w \S+=8080,[\d-]+`).FindString(out)
		if code == 0 || line == "" {
			t.Fatalf("exit %d, %q", code, out)
		}
		_, err := s.Gateway.Output("sh", "-c", line)
		s.Must(err)
		s.Serve(mapped, "--port-pool", pool)
		s.consoles(2)
	}
}

// The local port range grows over the pool while the daemon runs: a warning says so, a
// reload works, and hosts keep one outside port each.
func TestNFTRangeOfLocalPortsThatIsWidenedLater(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2})
	s.configured("reconcile = \"1s\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\nmapping = \"endpoint_independent\"\n")
	s.sysctl(localRange, "1024 65535")
	s.Until("the overlap is told", func() bool { return s.warns("sysctl -w " + reservedPorts) })
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Errorf("exit %d, %q", code, out)
	}
	s.consoles(2)
	s.sysctl(reservedPorts, "61000-65535")
	s.Until("the overlap is over", func() bool { return !s.warns("sysctl -w " + reservedPorts) })
}

// Sockets or forwards use ports of the pool, even a forward for one source only. The
// daemon starts, warns, does not use these ports, and can reload.
func TestNFTPoolThatIsInUseIsSteppedOver(t *testing.T) {
	for name, tc := range map[string]struct {
		rules, warning string
		sockets        bool
	}{
		"sockets":                     {"", "sockets of the gateway have ports of port_pool", true},
		"a forward":                   {`udp dport 61000-61047 dnat to 10.47.11.109`, "rules of yours forward ports of port_pool", false},
		"a forward with a condition":  {`ip saddr 192.0.2.1 udp dport 61000-61047 dnat to 10.47.11.109`, "rules of yours forward ports of port_pool", false},
		"a forward of the whole pool": {`udp dport 60000-62000 dnat to 10.47.11.109`, "rules of yours forward all of port_pool", false},
	} {
		t.Run(name, func(t *testing.T) {
			rules := fmt.Sprintf("table ip f { chain c { type nat hook prerouting priority dstnat; iifname \"wan0\" %s; }; }\n", tc.rules)
			if tc.rules == "" {
				rules = ""
			}
			s := newScene(t, lab.Options{Inside: 3, Rules: lab.Masquerade + rules})
			for port := uint16(61000); tc.sockets && port < 61048; port++ {
				s.Socket(s.Gateway.Namespace, s.Gateway.Addr, port)
			}
			s.configured("reconcile = \"1s\"\nport_pool = \"61000-61063\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\nmapping = \"endpoint_independent\"\n")
			s.Until("it is told", func() bool { return s.warns(tc.warning) })
			if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
				t.Errorf("exit %d, %q", code, out)
			}
			hosts, exts := s.consoles(3)
			for i, ext := range exts {
				if strings.Contains(name, "whole") {
					continue
				}
				if i > 0 && inPool(ext) && ext.Port() < 61048 {
					t.Errorf("host %d leaves as %v", i, ext)
				}
				s.Arrives(hosts[i], s.PeerSocket(lab.PeerA, uint16(20_000+i)), ext)
			}
		})
	}
}

// A program stays on a port in the local port range, so that port is the gateway's like
// any other: a host gets another port, and its peers get through.
func TestNFTPortOfTheGatewayWithinItsLocalRange(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2})
	s.Socket(s.Gateway.Namespace, netip.IPv4Unspecified(), 41641)
	s.Serve(stage.Auto[0], mapped)
	s.Contact(s.InsideSocket(1, 7000), s.PeerSocket(lab.PeerB, 7000)) // shows the outside address
	host := s.InsideSocket(0, 41641)
	ext := s.Contact(host, s.PeerSocket(lab.PeerA, 41641))
	for port := uint16(5000); port < 5003; port++ {
		if got := s.Contact(host, s.PeerSocket(lab.PeerB, port)); got != ext || !inPool(got) {
			t.Errorf("it leaves as %v and as %v", ext, got)
		}
	}
	s.Arrives(host, s.PeerSocket(lab.PeerA, 5070), ext)
}

// Nothing has shown the outside address yet; the rules tell it.
//
// Fails when the daemon waits for a flow to learn the address from, or assumes one where rules
// give several.
func TestNFTFirstFlowLeavesAPortToTheGateway(t *testing.T) {
	const second = "198.51.100.70"
	for name, tt := range map[string]struct {
		rules   string
		addr    string // that the host gets
		assumed bool
	}{
		"masquerade": {lab.Masquerade, "198.51.100.1", true},
		"fixed address": {`table ip nat { chain post { type nat hook postrouting priority srcnat;
			oifname "wan0" snat to ` + second + `; }; }`, second, true},
		"another one for one peer": {`table ip nat { chain post { type nat hook postrouting priority srcnat;
			oifname "wan0" ip daddr 192.0.2.0/24 snat to 198.51.100.71
			oifname "wan0" snat to ` + second + `; }; }`, second, true},
		"two addresses": {`table ip nat { chain post { type nat hook postrouting priority srcnat;
			oifname "wan0" ip saddr 10.47.11.110 snat to 198.51.100.71
			oifname "wan0" snat to ` + second + `; }; }`, second, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: tt.rules})
			s.IP(s.Gateway, "addr add "+second+"/32 dev lo")
			s.Socket(s.Gateway.Namespace, netip.IPv4Unspecified(), 41641)
			s.Serve(stage.Auto[0], mapped)
			ext := s.Contact(s.InsideSocket(0, 41641), s.PeerSocket(lab.PeerA, 41641))
			if ext.Addr() != netip.MustParseAddr(tt.addr) || inPool(ext) != tt.assumed {
				t.Errorf("it leaves as %v", ext)
			}
		})
	}
}

// Short-lived sockets, like a resolver's, end no permission and no mapping.
func TestSocketsThatComeAndGoEndNothing(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, {stage.Auto[0], mapped}, stage.Expect}, func(t *testing.T, mode ...string) {
		const ports, first = 40, 21_000
		s := play(t, lab.Options{}, append(mode, "--reconcile=1s")...)
		hosts, exts := make([]*lab.Socket, ports), make([]netip.AddrPort, ports)
		proxy := s.PeerSocket(lab.PeerA, 5060)
		for i := range hosts {
			hosts[i] = s.InsideSocket(0, first+uint16(i))
			exts[i] = s.Contact(hosts[i], proxy)
		}
		s.Until("all permissions stand", func() bool { return s.Status().Permissions.Standing == ports })
		for i := range hosts { // the daemon looks at sockets six times or more
			brief, err := s.Gateway.Socket(netip.IPv4Unspecified(), first+uint16(i))
			s.Must(err)
			for began := time.Now(); time.Since(began) < 150*time.Millisecond; {
				if n := s.Status().Permissions.Standing; n != ports {
					t.Fatalf("%d permissions stand while a socket is on port %d", n, first+i)
				}
			}
			s.Must(brief.Close())
		}
		other := s.PeerSocket(lab.PeerB, 5060)
		for i, host := range hosts {
			if got := s.Contact(host, other); got != exts[i] {
				t.Errorf("port %d: it left as %v, and leaves as %v", first+i, exts[i], got)
			}
		}
	})
}

// A short-lived socket, like a resolver's, is on the port when a host begins. The host
// gets its permission, and the socket still gets its packets.
//
// Fails when the daemon looks at sockets before it grants what the map carries.
func TestNFTSocketOfAMomentBarsNothing(t *testing.T) {
	s := play(t, lab.Options{}, stage.Auto[0], "--reconcile=10m")
	brief, err := s.Gateway.Socket(netip.IPv4Unspecified(), 5060)
	s.Must(err)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Arrives(brief, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Until("the daemon knows of it", func() bool { return len(s.List()) == 1 })
	s.Must(brief.Close())
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
}

// A socket that packets from outside cannot reach does not conflict with a permission: on
// an inside address or link, of containers, or of a transparent proxy. Other sockets do.
func TestSocketsThatGetNothingFromOutsideBarNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		addr, device string
		transparent  bool
		bars         bool
	}{
		"inside address":    {addr: "10.47.11.1"},
		"inside link":       {addr: "0.0.0.0", device: "lan0"},
		"containers":        {addr: "172.17.0.1"},
		"transparent proxy": {addr: "203.0.113.99", transparent: true},
		"outside link":      {addr: "0.0.0.0", device: "wan0", bars: true},
		"outside address":   {addr: "198.51.100.1", bars: true},
		"all addresses":     {addr: "::", bars: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{})
			s.IP(s.Gateway, "link add docker0 type bridge")
			s.IP(s.Gateway, "address add 172.17.0.1/16 dev docker0")
			s.gatewaySocket(tc.addr, 5060, tc.device, tc.transparent)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			other := s.InsideSocket(0, 7000)
			for _, flags := range [][]string{stage.Auto, stage.Expect, {stage.Auto[0], mapped}} {
				s.Serve(append(flags, "--reconcile=1s")...)
				s.Contact(other, proxy) // shows the outside address
				ext := s.Contact(phone, proxy)
				moved := tc.bars && len(flags) > 1
				if (ext.Port() == 5060) == moved {
					t.Errorf("%q: it leaves as %v", flags, ext)
				}
				state := "standing"
				if tc.bars && !moved {
					state = "refused"
				}
				s.Listed(phone, proxy, ext, state)
				s.Stop()
				_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp")
				s.Must(err)
			}
		})
	}
}

// gatewaySocket binds a socket in the gateway, to a device if one is given.
func (s *scene) gatewaySocket(addr string, port uint16, device string, transparent bool) {
	s.T.Helper()
	lc := net.ListenConfig{Control: func(_, _ string, rc syscall.RawConn) (err error) {
		failed := rc.Control(func(fd uintptr) {
			if device != "" {
				err = unix.BindToDevice(int(fd), device)
			}
			if transparent {
				err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
			}
		})
		return errors.Join(failed, err)
	}}
	s.Must(s.Gateway.Do(func() error {
		c, err := lc.ListenPacket(s.T.Context(), "udp", netip.AddrPortFrom(netip.MustParseAddr(addr), port).String())
		if err == nil {
			s.T.Cleanup(func() { c.Close() })
		}
		return err
	}))
}

// A flow without a mapping uses an outside port towards a remote endpoint. The port counts
// as in use for that remote as long as conntrack may keep the flow, and until a later
// reconcile sees that the flow lives. Otherwise the kernel would drop the packets of a
// host with that port.
func TestNFTTakenPortsOutlastTheirFlows(t *testing.T) {
	taken := regexp.MustCompile(`40000 \. 203\.0\.113\.5 \. 3074 .*?expires ([0-9a-z]+)`)
	for name, tc := range map[string]struct {
		reconcile, sysctl string
		least             time.Duration
	}{
		"reconcile rarely":                {"10m", "", 20 * time.Minute},
		"a long timeout":                  {"1s", "nf_conntrack_udp_timeout", 1000 * time.Second},
		"a long timeout of answered ones": {"1s", "nf_conntrack_udp_timeout_stream", 1000 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{}, mapped, "--reconcile="+tc.reconcile)
			own, proxy := s.Socket(s.Gateway.Namespace, s.Gateway.Addr, 40000), s.PeerSocket(lab.PeerA, 3074)
			if tc.sysctl != "" { // the daemon follows it
				s.sysctl("net.netfilter."+tc.sysctl, "1000")
			}
			var longest time.Duration
			s.Until("the port is taken for long", func() bool {
				s.Contact(own, proxy)
				out, err := s.Gateway.Output("nft", "list", "set", "ip", "conenat", "taken")
				s.Must(err)
				if m := taken.FindStringSubmatch(out); m != nil {
					longest, err = time.ParseDuration(m[1])
					s.Must(err)
				}
				return longest > tc.least-10*time.Second
			})
			// No mapping is used towards that remote endpoint.
			if got := s.Contact(s.InsideSocket(0, 40000), proxy); got.Port() == 40000 {
				t.Errorf("a host leaves as %v", got)
			}
		})
	}
}
