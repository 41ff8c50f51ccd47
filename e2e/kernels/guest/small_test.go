package guest

import (
	"cmp"
	"errors"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// smallEnv is the duration of each run of TestSmallGateway, such as "120s", for
// docs/results/small-gateways.md.
const smallEnv = "CONENATD_SMALL"

// A gateway with 512 MB has room for 4,096 conntrack entries, one with 1 GB for 8,192.
// Inside hosts contact 60 new, silent peers a second each; another host keeps 1,500 TCP
// connections, and makes 40 more every 20 s. As without conenatd, no connection fails
// and no entry is dropped.
//
// Fails when the room for expectations does not depend on the size and use of the
// conntrack table.
func TestSmallGateway(t *testing.T) {
	if os.Getenv("CONENATD_GUEST") == "" {
		t.Skip("it changes settings of the whole machine")
	}
	long, err := time.ParseDuration(os.Getenv(smallEnv))
	measured := err == nil
	if !measured {
		long = 40 * time.Second
	}
	for _, g := range []struct {
		name           string
		entries, hosts int
	}{
		{"512 MB", 4096, 1},
		{"1 GB", 8192, 2},
	} {
		t.Run(g.name, func(t *testing.T) {
			set(t, "/proc/sys/net/netfilter/nf_conntrack_max", g.entries)
			set(t, "/sys/module/nf_conntrack/parameters/hashsize", g.entries)
			s := stage.New(t, lab.Options{Inside: 3, Rules: lab.Masquerade + lab.DropPolicy})
			c := newClient(s, 2)
			c.connect(openConnections)
			flood := contacts(s, g.hosts, int(long/time.Second)*contactsPerSecond)
			modes := [][]string{nil, stage.Expect, stage.Auto}
			if g.hosts > 1 && !measured {
				modes = modes[1:] // one run without conenatd is enough to see that the lab itself loses nothing
			}
			for _, mode := range modes {
				name := cmp.Or(strings.Join(mode, " "), "stock")
				if r := runSmall(c, flood, g.hosts, mode); r != (small{}) {
					t.Errorf("%s: %+v", name, r)
				}
			}
		})
	}
}

// set writes a number to a file, and restores the file when the test ends.
func set(t *testing.T, path string, n int) {
	t.Helper()
	before, err := os.ReadFile(path)
	if err == nil {
		err = os.WriteFile(path, []byte(strconv.Itoa(n)), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(path, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// small is what went wrong on a small gateway.
type small struct {
	failed          int // connects that took more than one SYN
	drop, earlyDrop int // counters of the kernel
}

const (
	contactsPerSecond = 60
	openConnections   = 1500
	newConnections    = 40
	betweenNew        = 20 * time.Second
	smallPeersOnPort  = 50 // of the 64 that expectations allow
)

// contacts are perHost packets from each of some hosts, each packet a new flow, in turn.
func contacts(s *stage.Scene, hosts, perHost int) *lab.Flood {
	s.T.Helper()
	flood := s.Flood(hosts*perHost, true)
	for i := range flood.Len() {
		n := i / hosts
		flood.Aim(i, netip.AddrPortFrom(s.Inside(i%hosts).Addr, uint16(20_000+n/smallPeersOnPort)),
			netip.AddrPortFrom(stage.Peer(100+n%smallPeersOnPort), 9))
	}
	return flood
}

// runSmall plays the scene of TestSmallGateway, without a daemon if there is no mode.
func runSmall(c *client, flood *lab.Flood, hosts int, mode []string) (r small) {
	s := c.Scene
	s.T.Helper()
	_, err := s.Gateway.Output("sh", "-c", "conntrack -D -p udp || true") // from the run before
	s.Must(err)
	drop, earlyDrop := dropped(s)
	if mode != nil {
		s.Start(stage.Flags(mode)...)
		defer s.Stop()
	}
	seen, began, next := sample{}, time.Now(), betweenNew
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	rounds := 0
	round := func() {
		r.failed += c.connect(newConnections)
		c.disconnect(newConnections)
		rounds++
	}
	for sent := 0; sent < flood.Len(); <-tick.C {
		passed := time.Since(began)
		due := min(int(passed.Seconds()*contactsPerSecond)*hosts, flood.Len())
		s.Must(flood.Send(sent, due))
		sent = due
		seen.take(s, mode)
		if passed >= next {
			round()
			next += betweenNew
		}
	}
	round()
	r.drop, r.earlyDrop = dropped(s)
	r.drop, r.earlyDrop = r.drop-drop, r.earlyDrop-earlyDrop
	s.T.Logf("%v: %d entries at most, %d contacts, %d of %d connects failed, drop=%d early_drop=%d", mode, seen.entries, flood.Len(),
		r.failed, rounds*newConnections, r.drop, r.earlyDrop)
	if mode == nil {
		return r
	}
	st := s.Status()
	s.T.Logf("%d expectations at most, at the end %d, and %d permissions; refused %v",
		seen.expectations, st.Permissions.Expectations, st.Permissions.Standing, st.Counters.Refused)
	most, err := strconv.Atoi(sysctl(s, "nf_conntrack_max"))
	s.Must(err)
	if seen.expectations == 0 || seen.expectations > most/5 {
		s.T.Errorf("%d expectations", seen.expectations)
	}
	if !seen.warned {
		s.T.Errorf("no warning: %s", s.Daemon.Output())
	}
	if refused := st.Counters.Refused["no_room"] > 0; refused != slices.Equal(mode, stage.Expect) {
		s.T.Errorf("refused for want of room: %v", refused)
	}
	s.Verified()
	return r
}

// A sample holds the maxima seen so far.
type sample struct {
	entries, expectations int
	warned                bool
}

func (m *sample) take(s *stage.Scene, mode []string) {
	s.T.Helper()
	n, err := strconv.Atoi(sysctl(s, "nf_conntrack_count"))
	s.Must(err)
	m.entries = max(m.entries, n)
	if mode == nil {
		return
	}
	st := s.Status()
	m.expectations = max(m.expectations, st.Permissions.Expectations)
	m.warned = m.warned || stage.Warned(st, "raise net.netfilter.nf_conntrack_max")
}

func sysctl(s *stage.Scene, name string) string {
	s.T.Helper()
	text, err := s.Gateway.Sysctl("net.netfilter." + name)
	s.Must(err)
	return text
}

// dropped returns conntrack's counters of dropped packets and entries (conntrack -S).
func dropped(s *stage.Scene) (drop, early int) {
	s.T.Helper()
	out, err := s.Gateway.Output("conntrack", "-S")
	s.Must(err)
	for _, m := range regexp.MustCompile(`\b(early_drop|drop)=(\d+)`).FindAllStringSubmatch(out, -1) {
		n, err := strconv.Atoi(m[2])
		s.Must(err)
		if m[1] == "drop" {
			drop += n
		} else {
			early += n
		}
	}
	return drop, early
}

// A client keeps TCP connections from an inside host to an outside host.
type client struct {
	*stage.Scene
	from *lab.Host
	to   net.Addr
	open []*net.TCPConn
}

func newClient(s *stage.Scene, host int) *client {
	s.T.Helper()
	var l *net.TCPListener
	s.Must(s.Outside.Do(func() (err error) {
		l, err = net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(lab.PeerA, 80)))
		return err
	}))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			c, err := l.AcceptTCP()
			if err != nil {
				return
			}
			defer c.Close()
		}
	}()
	c := &client{Scene: s, from: s.Inside(host), to: l.Addr()}
	s.T.Cleanup(func() {
		l.Close()
		<-ended
		c.disconnect(len(c.open))
	})
	return c
}

// connect makes n more connections, and returns how many needed more than one SYN.
func (c *client) connect(n int) (failed int) {
	c.T.Helper()
	c.Must(c.from.Do(func() error {
		for range n {
			conn, err := net.DialTCP("tcp", nil, c.to.(*net.TCPAddr))
			if err != nil {
				return err
			}
			c.open = append(c.open, conn)
			raw, err := conn.SyscallConn()
			if err != nil {
				return err
			}
			var info *unix.TCPInfo
			failure := raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) })
			if err := errors.Join(failure, err); err != nil {
				return err
			}
			if info.Total_retrans > 0 {
				failed++
			}
		}
		return nil
	}))
	return failed
}

// disconnect ends the last n connections.
func (c *client) disconnect(n int) {
	for _, conn := range c.open[len(c.open)-n:] {
		conn.Close()
	}
	c.open = c.open[:len(c.open)-n]
}
