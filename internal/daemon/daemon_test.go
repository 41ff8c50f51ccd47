package daemon_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	// insideEnv tells this program that it runs in the gateway of a lab; it holds
	// a folder for the control socket.
	insideEnv = "CONENATD_DAEMON_TEST"
	// roleEnv says what it does there.
	roleEnv = "CONENATD_DAEMON_TEST_ROLE"
)

var inside = map[string]func(dir string) error{
	"stop": runInside, "fail": failInside, "unready": unreadyInside, "stuck": stuckInside,
	"exhausted": exhaustedInside, "narrow": narrowInside, "behind": behindInside, "without nftables": withoutNFTables,
}

// runRole lets this program play a role in the gateway.
func runRole(t *testing.T, l *lab.Lab, role string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := l.Gateway.Command(t.Context(), self)
	c.Env = append(os.Environ(), insideEnv+"="+t.TempDir(), roleEnv+"="+role)
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

func TestMain(m *testing.M) {
	if dir := os.Getenv(insideEnv); dir != "" {
		if err := inside[os.Getenv(roleEnv)](dir); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// runInside runs the daemon until it is ready, ends it, and looks for what it
// left running or open.
func runInside(dir string) error {
	cfg := config.Default()
	cfg.Subnets = []config.Subnet{{Prefix: lab.InsideNet}, {Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true}}
	ignore := goleak.IgnoreCurrent()
	before, err := openFiles()
	if err != nil {
		return err
	}
	for range 3 {
		d, err := daemon.New(daemon.Config{
			Config: cfg, Socket: filepath.Join(dir, "control.sock"), Log: slog.New(slog.DiscardHandler),
		})
		if err != nil {
			return err
		}
		ctx, cancel := context.WithCancel(context.Background())
		if err := d.Run(ctx, cancel); err != nil {
			return err
		}
	}
	if err := goleak.Find(ignore); err != nil {
		return err
	}
	// The first use of the network poller keeps two descriptors.
	if after, err := openFiles(); err != nil || after > before+2 {
		return fmt.Errorf("%d files were open before, %d are now: %w", before, after, err)
	}
	return nil
}

func openFiles() (int, error) {
	entries, err := os.ReadDir("/proc/self/fd")
	return len(entries), err
}

// Fails, for instance, when Run does not close the query sockets, or when the
// reconcile does not end with the loop.
func TestStopLeavesNoGoroutineAndNoFileOpen(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	runRole(t, l, "stop")
}

// newInside makes a daemon that serves the hosts of the lab.
func newInside(dir string) (*daemon.Daemon, error) {
	return newServing(dir, config.Subnet{Prefix: lab.InsideNet})
}

func newServing(dir string, subnets ...config.Subnet) (*daemon.Daemon, error) {
	cfg := config.Default()
	cfg.Subnets = subnets
	return daemon.New(daemon.Config{
		Config: cfg, Socket: filepath.Join(dir, "control.sock"), Log: slog.New(slog.DiscardHandler),
	})
}

// runReady runs d, waits until it is ready, and returns what stops it and what it returns then.
func runReady(d *daemon.Daemon) (stop context.CancelFunc, ended <-chan error) {
	ctx, stop := context.WithCancel(context.Background())
	ready, end := make(chan struct{}), make(chan error, 1)
	go func() { end <- d.Run(ctx, func() { close(ready) }) }()
	<-ready
	return stop, end
}

// failInside runs a daemon that fails as soon as it is ready.
func failInside(dir string) error {
	d, err := newInside(dir)
	if err != nil {
		return err
	}
	if err := d.Run(context.Background(), d.FailLinks); err == nil {
		return errors.New("the daemon did not fail")
	}
	return nil
}

// unreadyInside runs a daemon whose reconciles all fail.
func unreadyInside(dir string) error {
	d, err := newInside(dir)
	if err != nil {
		return err
	}
	d.FailReconcile()
	ready := false
	err = d.Run(context.Background(), func() { ready = true })
	if ready || err == nil || !strings.Contains(err.Error(), "no reconcile of 8 was good: read UDP sockets") {
		return fmt.Errorf("ready: %v; %w", ready, err)
	}
	return nil
}

// Fails when whatever ends the loop revokes all permissions.
func TestInternalErrorLeavesPermissionsToTheNextDaemon(t *testing.T) {
	t.Parallel()
	l := lab.ForTest(t, lab.Options{})
	phone, proxy := socket(t, l.Inside(0), 5060), socket(t, l.Outside, 5060)
	ext, err := phone.Contact(proxy)
	if err != nil {
		t.Fatal(err)
	}
	runRole(t, l, "fail")
	other := socket(t, l.Outside, 5070)
	if err := lab.Arrives(phone, lab.Packet{From: other, To: ext, Payload: "from another port"}); err != nil {
		t.Error(err)
	}
	runRole(t, l, "stop") // takes it over, and ends it
	rules, err := l.Ruleset()
	if err != nil || strings.Contains(rules, "conenat") {
		t.Errorf("left behind: %v\n%s", err, rules)
	}
}

func socket(t *testing.T, h *lab.Host, port uint16) *lab.Socket {
	t.Helper()
	s, err := h.Socket(h.Addr, port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// A daemon that knows nothing of the kernel is not ready, and ends.
func TestWithoutAGoodReconcileTheDaemonEnds(t *testing.T) {
	t.Parallel() // it takes its time
	runRole(t, lab.ForTest(t, lab.Options{}), "unready")
}

// stuckInside reads a configuration that does not come, from a file system that does not
// answer, while another one is read and the daemon is stopped.
func stuckInside(dir string) error {
	cfg := config.Default()
	cfg.Subnets = []config.Subnet{{Prefix: lab.InsideNet}}
	var out lines
	asked := make(chan chan config.Config)
	d, err := daemon.New(daemon.Config{
		Config: cfg, Socket: filepath.Join(dir, "control.sock"), Log: slog.New(slog.NewTextHandler(&out, nil)),
		Reload: func() (config.Config, error) {
			answer := make(chan config.Config)
			asked <- answer
			return <-answer, nil
		},
	})
	if err != nil {
		return err
	}
	stop, ended := runReady(d)
	defer stop()
	reload := func() (chan<- config.Config, <-chan error) {
		done := make(chan error, 1)
		go func() { done <- d.Reload() }()
		return <-asked, done
	}
	answerFirst, first := reload()
	answerSecond, second := reload()
	next := cfg
	next.Lifetime = time.Minute
	answerSecond <- next
	if err := <-second; err != nil {
		return fmt.Errorf("reload while an earlier one hangs: %w", err)
	}
	answerFirst <- cfg
	if err := <-first; err != nil {
		return fmt.Errorf("reload that was overtaken: %w", err)
	}
	if n := strings.Count(out.String(), "configuration reloaded"); n != 1 {
		return fmt.Errorf("%d configurations were put in force, want 1: %s", n, out.String())
	}
	_, hangs := reload()
	stop()
	if err := <-ended; err != nil {
		return err
	}
	if err := <-hangs; err == nil {
		return errors.New("a reload that hangs is good")
	}
	return nil
}

// lines collects a log.
type lines struct {
	mu sync.Mutex
	b  strings.Builder
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Fails, for good, when a reload waits for an earlier one that hangs, or a stop for either.
func TestAFileThatCannotBeReadHoldsUpNothing(t *testing.T) {
	t.Parallel()
	runRole(t, lab.ForTest(t, lab.Options{}), "stuck")
}
