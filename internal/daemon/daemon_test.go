package daemon_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/lab"
)

// insideEnv tells this program that it runs in the gateway of a lab; it holds
// a folder for the control socket.
const insideEnv = "CONENATD_DAEMON_TEST"

func TestMain(m *testing.M) {
	if dir := os.Getenv(insideEnv); dir != "" {
		if err := runInside(dir); err != nil {
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
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := l.Gateway.Command(t.Context(), self)
	c.Env = append(os.Environ(), insideEnv+"="+t.TempDir())
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}
