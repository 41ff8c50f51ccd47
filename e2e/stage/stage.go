// Package stage is the base of the end-to-end tests: a throw-away lab (package lab)
// with the real program as a process in its gateway.
package stage

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
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// exe is the program under test, built with the race detector except for benchmarks.
var exe string

// Exe returns the path of the program under test.
func Exe() string { return exe }

// Main builds the program, runs the tests and exits. CONENATD_EXE names a program to
// use instead, for a machine without Go. Benchmarks, and tests on 32-bit machines, which have
// no race detector, use a program without it.
func Main(m *testing.M) {
	code, err := build(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

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
	var args []string
	flag.Parse()
	if strconv.IntSize == 64 && flag.Lookup("test.bench").Value.String() == "" {
		// Without this, the race detector makes each process sleep before it exits.
		_ = os.Setenv("GORACE", "atexit_sleep_ms=0")
		args = append(args, "-race")
	}
	if err := compile(exe, args...); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

func compile(path string, args ...string) error {
	args = append(append([]string{"build", "-o", path}, args...), "github.com/conenatd/conenatd/cmd/conenatd")
	out, err := exec.Command("go", args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("build conenatd: %w: %s", err, out)
	}
	return nil
}

// Plain returns the path of a program without the race detector, which costs several
// times the memory and CPU. CONENATD_EXE overrides it.
func Plain(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("CONENATD_EXE"); path != "" {
		return path
	}
	return Build(t)
}

// Build returns the path of a program that it builds with these build tags, without the race
// detector.
func Build(t *testing.T, tags ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "conenatd")
	if err := compile(path, "-tags="+strings.Join(tags, ",")); err != nil {
		t.Fatal(err)
	}
	return path
}

// ForAll returns the path of a copy of the program that every user may run.
func (s *Scene) ForAll() string {
	s.T.Helper()
	dir, err := os.MkdirTemp("", "conenatd-e2e-")
	s.Must(err)
	s.T.Cleanup(func() { s.Must(os.RemoveAll(dir)) })
	s.Must(os.Chmod(dir, 0o755))
	program, err := os.ReadFile(s.Exe)
	s.Must(err)
	path := filepath.Join(dir, "conenatd")
	// A process that is started meanwhile would hold the file open for writing for a moment,
	// and the kernel runs no such file (ETXTBSY).
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	s.Must(os.WriteFile(path, program, 0o755))
	return path
}

// A Scene is a lab with a daemon in its gateway. Its methods fail the test on an
// error.
type Scene struct {
	*lab.Lab
	T      *testing.T
	Daemon *lab.Daemon // nil while none runs
	Exe    string      // the program
	begun  bool        // a daemon was started
}

// New makes a lab without a daemon.
func New(t *testing.T, o lab.Options) *Scene {
	t.Helper()
	s := &Scene{Lab: lab.ForTest(t, o), T: t, Exe: exe}
	t.Cleanup(s.forget)
	return s
}

// forget removes what killed daemons left in /run/conenatd.
func (s *Scene) forget() {
	var prefix string
	s.Must(s.Gateway.Do(func() (err error) {
		prefix, err = control.File(".")
		return err
	}))
	left, err := filepath.Glob(prefix + "*")
	s.Must(err)
	for _, path := range left {
		s.Must(os.Remove(path))
	}
}

// Serve starts a daemon that serves the inside network.
func (s *Scene) Serve(args ...string) {
	s.T.Helper()
	s.Start(Flags(args)...)
}

// Start starts the daemon, to be stopped when the test ends. It skips a test whose first daemon
// overrides the whole mode of this run: the run in the default mode has the same daemon.
func (s *Scene) Start(args ...string) {
	s.T.Helper()
	mode := strings.Fields(os.Getenv(ModeEnv))
	if !s.begun && overrides(args, mode) {
		s.T.Skip("it chooses its mode itself")
	}
	s.begun = true
	d, err := s.StartDaemon(s.Exe, append(mode, args...)...)
	if err != nil {
		s.T.Fatal(err)
	}
	s.Daemon = d
	if slices.Contains(mode, "--events=lean") {
		s.Until("the kernel hides flows", func() bool { return s.Status().Events.Mode == "lean" })
	}
	s.T.Cleanup(func() {
		if s.Daemon != d {
			return // the test stopped it
		}
		s.Stop()
		if s.T.Failed() {
			s.T.Logf("daemon:\n%s", d.Output())
		}
	})
}

// Stop stops the daemon; a data race or a failed clean-up is an error.
func (s *Scene) Stop() {
	s.T.Helper()
	d := s.Daemon
	s.Daemon = nil
	if err := d.Stop(); err != nil {
		s.T.Error(err)
	}
}

// Kill ends the daemon as kill -9 does.
func (s *Scene) Kill() {
	s.T.Helper()
	d := s.Daemon
	s.Daemon = nil
	if err := d.Kill(); err != nil {
		s.T.Fatal(err)
	}
}

// Must fails the test if there is an error.
func (s *Scene) Must(err error) {
	s.T.Helper()
	if err != nil {
		s.T.Fatal(err)
	}
}

// Socket opens a UDP socket that is closed when the test ends.
func (s *Scene) Socket(n *lab.Namespace, addr netip.Addr, port uint16) *lab.Socket {
	s.T.Helper()
	sock, err := n.Socket(addr, port)
	s.Must(err)
	s.T.Cleanup(func() { sock.Close() })
	return sock
}

// InsideSocket opens a socket on inside host i.
func (s *Scene) InsideSocket(i int, port uint16) *lab.Socket {
	s.T.Helper()
	h := s.Inside(i)
	return s.Socket(h.Namespace, h.Addr, port)
}

// PeerSocket opens a socket on an outside address.
func (s *Scene) PeerSocket(addr netip.Addr, port uint16) *lab.Socket {
	s.T.Helper()
	return s.Socket(s.Outside.Namespace, addr, port)
}

// Contact lets in send to peer and returns the outside endpoint.
func (s *Scene) Contact(in, peer *lab.Socket) netip.AddrPort {
	s.T.Helper()
	ext, err := in.Contact(peer)
	s.Must(err)
	return ext
}

// serial makes payloads unique, so that no packet can be mistaken for another.
var serial atomic.Int64

// Payload returns a unique payload that begins with what.
func Payload(what string) string { return fmt.Sprintf("%s %d", what, serial.Add(1)) }

// Arrives checks that the first packet of from to ext reaches in.
func (s *Scene) Arrives(in, from *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	p := Payload("answer")
	s.Must(from.Send(ext, p))
	got, err := in.Expect(p)
	if err != nil {
		s.T.Fatalf("from %v to %v: %v\n%s", from.Addr(), ext, err, s.Dump())
	}
	if got != from.Addr() {
		s.T.Errorf("the answer from %v seems to come from %v", from.Addr(), got)
	}
}

// Lost checks that a packet of from to ext does not reach in, while one of fence
// does.
func (s *Scene) Lost(in, from *lab.Socket, ext netip.AddrPort, fence *lab.Socket) {
	s.T.Helper()
	err := lab.Lost(in,
		lab.Packet{From: from, To: ext, Payload: Payload("must not arrive")},
		lab.Packet{From: fence, To: ext, Payload: Payload("fence")})
	if err != nil {
		s.T.Fatalf("from %v to %v: %v\n%s", from.Addr(), ext, err, s.Dump())
	}
}

// dumpLines bounds each part of a dump.
const dumpLines = 100

// Dump shows what is in the kernel and what the daemon thinks.
func (s *Scene) Dump() string {
	var b strings.Builder
	for _, args := range [][]string{{"-p", "udp"}, {"expect"}} {
		lines, err := s.Conntrack(args...)
		fmt.Fprintln(&b, "conntrack", args, err)
		for _, l := range lines[:min(len(lines), dumpLines)] {
			fmt.Fprintln(&b, " ", l)
		}
	}
	if s.Daemon != nil {
		ps := s.List()
		for _, p := range ps[:min(len(ps), dumpLines)] {
			fmt.Fprintf(&b, "  %+v\n", p)
		}
		fmt.Fprintln(&b, s.Daemon.Output())
	}
	return b.String()
}

// List is what "conenatd list" shows.
func (s *Scene) List() (ps []control.Permission) {
	s.T.Helper()
	ctx, cancel := context.WithTimeout(s.T.Context(), 3*Patience())
	defer cancel()
	s.Must(control.Dial(s.Daemon.Socket).Permissions(ctx, func(p control.Permission) error {
		ps = append(ps, p)
		return nil
	}))
	return ps
}

// Verified checks that the daemon, the kernel's permissions and conntrack agree.
func (s *Scene) Verified() {
	s.T.Helper()
	out, code := s.CLI("status", "--verify", "--control-socket", s.Daemon.Socket)
	if code != 0 || !strings.Contains(out, "; 0 wrong") {
		s.T.Errorf("exit %d, %s", code, out)
	}
}

// Status is what "conenatd status" shows.
func (s *Scene) Status() control.Status {
	s.T.Helper()
	st, err := control.Dial(s.Daemon.Socket).Status(s.T.Context())
	s.Must(err)
	return st
}

// Patience bounds each wait for something that must happen. Emulated guests and busy
// machines are slow. Only a failing test uses it up.
func Patience() time.Duration {
	if os.Getenv("CONENATD_GUEST") != "" {
		return 2 * time.Minute
	}
	return time.Minute
}

// between is the least pause between two looks of Until. A pause lasts twice as long as the
// look before it, if that is more: a test that waits must leave the CPUs to the daemon and
// to other tests, and to list conntrack entries takes 10 ms of one.
const between = 5 * time.Millisecond

// Until repeats cond until it holds.
func (s *Scene) Until(what string, cond func() bool) {
	s.T.Helper()
	s.UntilIn(Patience(), what, cond)
}

// UntilIn is Until with another bound, for large tests.
func (s *Scene) UntilIn(bound time.Duration, what string, cond func() bool) {
	s.T.Helper()
	for end := time.Now().Add(bound); ; {
		began := time.Now()
		if cond() {
			return
		}
		if time.Now().After(end) {
			s.T.Fatalf("waited in vain until %s\n%s", what, s.Dump())
		}
		time.Sleep(max(between, 2*time.Since(began)))
	}
}

// Listed waits until the claim of in on ext towards peer has the state.
func (s *Scene) Listed(in, peer *lab.Socket, ext netip.AddrPort, state string) (found control.Permission) {
	s.T.Helper()
	s.Until(fmt.Sprintf("%v <- %v is %s", ext, peer.Addr().Addr(), state), func() bool {
		i := slices.IndexFunc(s.List(), func(p control.Permission) bool {
			found = p
			return p.Int == in.Addr() && p.Ext == ext && p.Peer == peer.Addr().Addr() && p.State == state
		})
		return i >= 0
	})
	return found
}

// Stands waits until the permission stands.
func (s *Scene) Stands(in, peer *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Listed(in, peer, ext, "standing")
}

// ConntrackList returns the lines of conntrack -L.
func (s *Scene) ConntrackList(args ...string) []string {
	s.T.Helper()
	lines, err := s.Conntrack(args...)
	s.Must(err)
	return lines
}

// InKernel returns a line for each permission in the kernel: its expectation, or its
// element in the map. In auto a lab's firewall leads to only one of the two.
func (s *Scene) InKernel() []string {
	s.T.Helper()
	return append(s.ConntrackList("expect"), s.Elements()...)
}

var element = regexp.MustCompile(`[\d.]+ \. [\d.]+ \. \d+ [^,}]*`)

// Elements returns the elements of the map of permissions, or none if there is no
// table.
func (s *Scene) Elements() []string {
	s.T.Helper()
	rules, err := s.Ruleset()
	s.Must(err)
	if !strings.Contains(rules, "map permissions") {
		return nil
	}
	list, err := s.Gateway.Output("nft", "list", "map", "ip", "conenat", "permissions")
	s.Must(err)
	return element.FindAllString(list, -1)
}

// Leftovers returns what a stopped daemon left in the kernel.
func (s *Scene) Leftovers() []string {
	s.T.Helper()
	left := append(s.ConntrackList("expect"), s.Anchors()...)
	rules, err := s.Ruleset()
	s.Must(err)
	if strings.Contains(rules, "conenat") {
		left = append(left, rules)
	}
	return left
}

// Anchors returns the anchors among the conntrack entries.
func (s *Scene) Anchors() (out []string) {
	s.T.Helper()
	for _, l := range s.ConntrackList("-p", "udp") {
		if strings.Contains(l, "port=0 ") {
			out = append(out, l)
		}
	}
	return out
}

// CLI runs the program in the gateway and returns what it wrote and its exit
// code.
func (s *Scene) CLI(args ...string) (out string, code int) {
	s.T.Helper()
	ctx, cancel := context.WithTimeout(s.T.Context(), 3*Patience())
	defer cancel()
	b, err := s.Gateway.Command(ctx, s.Exe, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.T.Fatal(err)
	}
	if exit != nil {
		code = exit.ExitCode()
	}
	return string(b), code
}

// CountElements counts the elements of the map of permissions; there may be too many
// for nft to list.
func (s *Scene) CountElements() (n int) {
	s.T.Helper()
	c, err := nfnl.Dial(s.Gateway.FD())
	s.Must(err)
	defer c.Close()
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETSETELEM, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), unix.AF_INET)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, "conenat")
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, "permissions")
	e.End()
	err = c.Exchange(&e, func(_ uint32, refused error) { s.T.Error(refused) }, func(_ uint16, body []byte) {
		const header = 4 // struct nfgenmsg
		list, err := netlink.NewAttributeDecoder(body[header:])
		s.Must(err)
		for list.Next() {
			if list.Type() == unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				list.Nested(func(elements *netlink.AttributeDecoder) error {
					n += elements.Len()
					return nil
				})
			}
		}
		s.Must(list.Err())
	})
	s.Must(err)
	return n
}
