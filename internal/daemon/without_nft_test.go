package daemon_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/daemon"
	"github.com/conenatd/conenatd/internal/lab"
)

// withoutNFTables runs a daemon on a kernel that has no nftables, until its input ends.
func withoutNFTables(dir string) error {
	daemon.WithoutNFTables()
	cfg := config.Default()
	cfg.Subnets = []config.Subnet{{Prefix: lab.InsideNet}}
	cfg.Reconcile = time.Hour
	d, err := daemon.New(daemon.Config{
		Config: cfg, Socket: filepath.Join(dir, "control.sock"), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(context.Background())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		stop()
	}()
	return d.Run(ctx, func() {})
}

// Where the kernel has iptables-legacy alone, its rules say the same as beside nftables: what
// they forward gets no permission, a chain that drops children is named, and a change of
// either counts long before the next reconcile.
//
// Fails when rules are read, or looked at again, only if we have tables of our own.
func TestLegacyRulesAreFollowedWithoutNFTables(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Inside: 2, Rules: lab.NoRules})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	legacy := func(rules string) {
		t.Helper()
		must(l.IPTables(lab.IPTablesLegacy, rules))
	}
	forward := func(port int) string {
		return fmt.Sprintf("*nat\n-A PREROUTING -i wan0 -p udp --dport %d -j DNAT --to-destination 10.47.11.110\nCOMMIT\n", port)
	}
	legacy(lab.IPTablesMasquerade + strings.ReplaceAll(lab.IPTablesDropPolicy, ",RELATED", "") + forward(5061))
	proxy := socket(t, l.Outside, 5060)
	exts := make(map[uint16]netip.AddrPort)
	for _, port := range []uint16{5060, 5061} {
		var err error
		exts[port], err = socket(t, l.Inside(0), port).Contact(proxy)
		must(err)
	}

	self, err := os.Executable()
	must(err)
	dir := t.TempDir()
	c := l.Gateway.Command(t.Context(), self)
	c.Env = append(os.Environ(), insideEnv+"="+dir, roleEnv+"=without nftables")
	input, err := c.StdinPipe()
	must(err)
	must(c.Start())
	defer func() {
		_ = input.Close()
		must(c.Wait())
	}()
	client := control.Dial(filepath.Join(dir, "control.sock"))
	until := func(what string, cond func() bool) {
		t.Helper()
		for end := time.Now().Add(time.Minute); !cond(); {
			if time.Now().After(end) {
				t.Fatalf("waited in vain until %s", what)
			}
		}
	}
	is := func(port uint16, state, reason string) func() bool {
		return func() (found bool) {
			_ = client.Permissions(t.Context(), func(p control.Permission) error {
				found = found || p.Ext == exts[port] && p.State == state && p.Reason == reason
				return nil
			})
			return found
		}
	}
	warned := func() bool {
		st, err := client.Status(t.Context())
		must(err)
		return slices.ContainsFunc(st.Warnings, func(w string) bool { return strings.Contains(w, "iptables-legacy filter FORWARD") })
	}
	until("the permission stands, in vain", is(5060, "standing", "dropped"))
	until("that of the forward is refused", is(5061, "refused", "forwarded"))
	until("the chain is named", warned)
	legacy("*filter\n-A FORWARD -m conntrack --ctstate RELATED -j ACCEPT\nCOMMIT\n")
	until("it lets children pass", func() bool { return !warned() })
	legacy(forward(5060))
	until("the new forward counts", is(5060, "refused", "forwarded"))
}
