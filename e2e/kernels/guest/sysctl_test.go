package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// In the initial network namespace, the only one that may write the sysctl, the
// daemon makes room in the expectation table, and again when somebody lowers it. When
// the daemon ends, the table has the size that somebody set last.
//
// Fails when the reconcile does not restore the size.
func TestTheExpectationTableKeepsItsRoom(t *testing.T) {
	if os.Getenv("CONENATD_GUEST") == "" {
		t.Skip("it changes a setting of the whole machine")
	}
	const size = "/proc/sys/net/netfilter/nf_conntrack_expect_max"
	read := func() string {
		b, err := os.ReadFile(size)
		if err != nil {
			t.Fatal(err)
		}
		return strings.TrimSpace(string(b))
	}
	until := func(what string, cond func() bool) {
		t.Helper()
		for end := time.Now().Add(2 * time.Minute); !cond(); {
			if time.Now().After(end) {
				t.Fatalf("waited in vain until %s", what)
			}
		}
	}
	var out strings.Builder
	socket := filepath.Join(t.TempDir(), "control.sock")
	c := exec.CommandContext(t.Context(), stage.Exe(), "run", "--subnet", "10.47.11.0/24", "--reconcile=1s", "--control-socket", socket)
	c.Stdout, c.Stderr = &out, &out
	write := func(n string) {
		if err := os.WriteFile(size, []byte(n), 0); err != nil {
			t.Fatal(err)
		}
	}
	asBooted := read()
	defer write(asBooted)
	const before, smaller = "1024", "2048"
	write(before)
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	status := func() (s control.Status, err error) { return control.Dial(socket).Status(t.Context()) }
	until("the daemon answers", func() bool { _, err := status(); return err == nil })
	roomy := read()
	if roomy == before {
		t.Fatalf("the table has room for %s, as before; %s", roomy, out.String())
	}
	write(smaller)
	until("the table has its room again", func() bool { return read() == roomy })
	until("it is counted", func() bool {
		s, err := status()
		return err == nil && s.Counters.Repaired["expect_max"] == 1
	})
	if err := c.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := c.Wait(); err != nil {
		t.Error(err, out.String())
	}
	if got := read(); got != smaller {
		t.Errorf("the table has room for %s, want %s", got, smaller)
	}
}

// The limit of children follows the size of the conntrack table, unless it is
// configured.
//
// Fails when the reconcile does not read that size, and when a configured limit
// follows it.
func TestLimitsFollowTheConntrackTable(t *testing.T) {
	if os.Getenv("CONENATD_GUEST") == "" {
		t.Skip("it changes a setting of the whole machine")
	}
	const size = "/proc/sys/net/netfilter/nf_conntrack_max"
	for name, tt := range map[string]struct {
		args        []string
		large, less int
	}{
		"not set": {nil, 256, 128},
		"set":     {[]string{"--max-children=200"}, 200, 200},
	} {
		t.Run(name, func(t *testing.T) {
			s := stage.New(t, lab.Options{})
			s.Start(stage.Flags(stage.Expect, append(tt.args, "--reconcile=1s")...)...)
			children := func(n int) func() bool {
				return func() bool {
					rules, err := s.Ruleset()
					s.Must(err)
					return strings.Contains(rules, fmt.Sprintf("ct count over %d ", n))
				}
			}
			s.Until("the limit suits a large table", children(tt.large))
			set(t, size, 4096)
			s.Until("the room suits a small one", func() bool { return s.Status().Permissions.Limit == 4096/5 })
			s.Until("the limit does", children(tt.less))
		})
	}
}
