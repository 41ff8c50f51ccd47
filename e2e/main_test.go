// Package e2e proves conenatd with real packets: the real program runs as a
// process in the gateway of a throw-away lab (package lab).
package e2e

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// exe is the program under test, built with the race detector but for
// benchmarks.
var exe string

func TestMain(m *testing.M) {
	if os.Getenv(minimalEnv) != "" {
		minimalMain() // this process is the yardstick of the latency benchmark
	}
	code, err := build(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// build builds the program and runs the tests. CONENATD_EXE names a program
// that is built already, for a machine without Go. Benchmarks measure a program
// without the race detector.
func build(m *testing.M) (int, error) {
	if exe = os.Getenv("CONENATD_EXE"); exe != "" {
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "conenatd-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	exe = filepath.Join(dir, "conenatd")
	args := []string{"build", "-o", exe}
	flag.Parse()
	if flag.Lookup("test.bench").Value.String() == "" {
		// The race detector would make each process sleep before it ends.
		os.Setenv("GORACE", "atexit_sleep_ms=0")
		args = append(args, "-race")
	}
	out, err := exec.Command("go", append(args, "../cmd/conenatd")...).CombinedOutput()
	if err != nil {
		return 1, fmt.Errorf("build conenatd: %w: %s", err, out)
	}
	return m.Run(), nil
}

// A scene is a lab with a daemon in its gateway.
type scene struct {
	*lab.Lab
	t *testing.T
	d *lab.Daemon
}

// newScene makes a lab without a daemon.
func newScene(t *testing.T, o lab.Options) *scene {
	t.Helper()
	return &scene{Lab: lab.ForTest(t, o), t: t}
}

// play makes a lab with a daemon that serves the inside network.
func play(t *testing.T, o lab.Options, args ...string) *scene {
	t.Helper()
	s := newScene(t, o)
	s.start(append([]string{"--subnet", lab.InsideNet.String()}, args...)...)
	return s
}

// modeEnv has flags for every daemon, such as "--backend=nft --learn=false":
// the same tests then show another mode. Flags of a test go before.
const modeEnv = "CONENATD_MODE"

// start starts the daemon, to be stopped when the test ends.
func (s *scene) start(args ...string) {
	s.t.Helper()
	d, err := s.StartDaemon(exe, append(strings.Fields(os.Getenv(modeEnv)), args...)...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.d = d
	s.t.Cleanup(func() {
		if s.d != d {
			return // the test stopped it
		}
		s.stop()
		if s.t.Failed() {
			s.t.Logf("daemon:\n%s", d.Output())
		}
	})
}

// stop stops the daemon; a data race or a failed clean-up is an error.
func (s *scene) stop() {
	s.t.Helper()
	d := s.d
	s.d = nil
	if err := d.Stop(); err != nil {
		s.t.Error(err)
	}
}

func (s *scene) kill() {
	s.t.Helper()
	d := s.d
	s.d = nil
	if err := d.Kill(); err != nil {
		s.t.Fatal(err)
	}
}

func (s *scene) must(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// socket opens a UDP socket that is closed when the test ends.
func (s *scene) socket(n *lab.Namespace, addr netip.Addr, port uint16) *lab.Socket {
	s.t.Helper()
	sock, err := n.Socket(addr, port)
	s.must(err)
	s.t.Cleanup(func() { sock.Close() })
	return sock
}

// inside opens a socket on inside host i, peer one on an outside address.
func (s *scene) inside(i int, port uint16) *lab.Socket {
	s.t.Helper()
	h := s.Inside(i)
	return s.socket(h.Namespace, h.Addr, port)
}

func (s *scene) peer(addr netip.Addr, port uint16) *lab.Socket {
	s.t.Helper()
	return s.socket(s.Outside.Namespace, addr, port)
}

// contact lets in send to peer and returns the outside endpoint.
func (s *scene) contact(in, peer *lab.Socket) netip.AddrPort {
	s.t.Helper()
	ext, err := in.Contact(peer)
	s.must(err)
	return ext
}

// serial makes payloads unique, so that no packet is taken for another.
var serial atomic.Int64

func payload(what string) string { return fmt.Sprintf("%s %d", what, serial.Add(1)) }

// arrives checks that from reaches in by ext, at once.
func (s *scene) arrives(in, from *lab.Socket, ext netip.AddrPort) {
	s.t.Helper()
	p := payload("answer")
	s.must(from.Send(ext, p))
	got, err := in.Expect(p)
	if err != nil {
		s.t.Fatalf("from %v to %v: %v\n%s", from.Addr(), ext, err, s.dump())
	}
	if got != from.Addr() {
		s.t.Errorf("the answer from %v seems to come from %v", from.Addr(), got)
	}
}

// lost checks that from does not reach in by ext, while fence does.
func (s *scene) lost(in, from *lab.Socket, ext netip.AddrPort, fence *lab.Socket) {
	s.t.Helper()
	err := lab.Lost(in,
		lab.Packet{From: from, To: ext, Payload: payload("must not arrive")},
		lab.Packet{From: fence, To: ext, Payload: payload("fence")})
	if err != nil {
		s.t.Fatalf("from %v to %v: %v\n%s", from.Addr(), ext, err, s.dump())
	}
}

// dumpLines bounds each part of a dump.
const dumpLines = 100

// dump shows what is in the kernel and what the daemon thinks.
func (s *scene) dump() string {
	var b strings.Builder
	for _, args := range [][]string{{"-p", "udp"}, {"expect"}} {
		lines, err := s.Conntrack(args...)
		fmt.Fprintln(&b, "conntrack", args, err)
		for _, l := range lines[:min(len(lines), dumpLines)] {
			fmt.Fprintln(&b, " ", l)
		}
	}
	if s.d != nil {
		ps := s.list()
		for _, p := range ps[:min(len(ps), dumpLines)] {
			fmt.Fprintf(&b, "  %+v\n", p)
		}
		fmt.Fprintln(&b, s.d.Output())
	}
	return b.String()
}

// list is what "conenatd list" shows.
func (s *scene) list() (ps []control.Permission) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), patience())
	defer cancel()
	s.must(control.Dial(s.d.Socket).Permissions(ctx, func(p control.Permission) error {
		ps = append(ps, p)
		return nil
	}))
	return ps
}

func (s *scene) status() control.Status {
	s.t.Helper()
	st, err := control.Dial(s.d.Socket).Status(s.t.Context())
	s.must(err)
	return st
}

// patience bounds the wait for what must come; an emulated guest is slow.
func patience() time.Duration {
	if os.Getenv("CONENATD_GUEST") != "" {
		return 2 * time.Minute
	}
	return 20 * time.Second
}

// until asks cond again and again until it holds.
func (s *scene) until(what string, cond func() bool) {
	s.t.Helper()
	for end := time.Now().Add(patience()); !cond(); {
		if time.Now().After(end) {
			s.t.Fatalf("waited in vain until %s\n%s", what, s.dump())
		}
	}
}

// listed waits until the claim of in towards peer by ext has the state.
func (s *scene) listed(in, peer *lab.Socket, ext netip.AddrPort, state string) (found control.Permission) {
	s.t.Helper()
	s.until(fmt.Sprintf("%v <- %v is %s", ext, peer.Addr().Addr(), state), func() bool {
		i := slices.IndexFunc(s.list(), func(p control.Permission) bool {
			found = p
			return p.Int == in.Addr() && p.Ext == ext && p.Peer == peer.Addr().Addr() && p.State == state
		})
		return i >= 0
	})
	return found
}

// stands waits until the permission stands.
func (s *scene) stands(in, peer *lab.Socket, ext netip.AddrPort) {
	s.t.Helper()
	s.listed(in, peer, ext, "standing")
}

// conntrack returns the lines of conntrack -L.
func (s *scene) conntrack(args ...string) []string {
	s.t.Helper()
	lines, err := s.Conntrack(args...)
	s.must(err)
	return lines
}

// usesExpect reports whether the daemons of this run have the expect backend, if
// a test says nothing else.
func usesExpect() bool { return !strings.Contains(os.Getenv(modeEnv), "--backend=nft") }

// needsExpect skips a test of what the nft backend does not promise.
func needsExpect(t *testing.T) {
	t.Helper()
	if !usesExpect() {
		t.Skip("conntrack expectations alone do this, and this run is without them")
	}
}

// inKernel returns a line for each permission in the kernel: its expectation, or
// its element of the map.
func (s *scene) inKernel() []string {
	s.t.Helper()
	if usesExpect() {
		return s.conntrack("expect")
	}
	return s.elements()
}

var element = regexp.MustCompile(`[\d.]+ \. [\d.]+ \. \d+ [^,}]*`)

// elements returns the elements of the map of permissions, none where there is no
// table.
func (s *scene) elements() []string {
	s.t.Helper()
	rules, err := s.Ruleset()
	s.must(err)
	if !strings.Contains(rules, "map permissions") {
		return nil
	}
	list, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "permissions")
	s.must(err)
	return element.FindAllString(list, -1)
}

// leftovers returns what a stopped daemon left in the kernel.
func (s *scene) leftovers() []string {
	s.t.Helper()
	left := append(s.conntrack("expect"), s.anchors()...)
	rules, err := s.Ruleset()
	s.must(err)
	if strings.Contains(rules, "conenat") {
		left = append(left, rules)
	}
	return left
}

// anchors returns the anchors among the conntrack entries.
func (s *scene) anchors() (out []string) {
	s.t.Helper()
	for _, l := range s.conntrack("-p", "udp") {
		if strings.Contains(l, "port=0 ") {
			out = append(out, l)
		}
	}
	return out
}

// cli runs the program in the gateway and returns what it wrote and its exit
// code.
func (s *scene) cli(args ...string) (out string, code int) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 3*patience())
	defer cancel()
	b, err := s.Gateway.Command(ctx, exe, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.t.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(b), code
}
