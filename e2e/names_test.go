package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// Commands find the socket and the tables that the daemon's configuration names,
// without that file.
//
// Fails when a command looks for the daemon at the default path, and when cleanup looks
// for tables of the default name.
func TestCommandsFindTheDaemonAndTheTablesOfItsConfiguration(t *testing.T) {
	s := newScene(t, lab.Options{})
	config := filepath.Join(t.TempDir(), "c.toml")
	s.Must(os.WriteFile(config, []byte("table = \"other\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\n"), 0o644))
	s.Start("--config", config, "--reconcile=1s") // with a control socket of its own
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	for _, c := range []struct{ args, want string }{
		{"list", proxy.Addr().Addr().String()},
		{"status", "10.47.11.0/24"},
		{"status --verify", "; 0 wrong"},
		{"reload", ""},
		{"revoke 10.47.11.109", "revoked 1 permission;"},
		{"flush", "revoked 0 permissions\n"},
	} {
		if out, code := s.CLI(strings.Fields(c.args)...); code != 0 || !strings.Contains(out, c.want) {
			t.Errorf("%s: exit %d, %q", c.args, code, out)
		}
	}
	s.Kill()
	if out, code := s.CLI("status"); code != 1 || !strings.Contains(out, "no conenatd runs") {
		t.Errorf("status without a daemon: exit %d, %q", code, out)
	}
	if out, code := s.CLI("cleanup"); code != 0 || !strings.HasSuffix(out, "removed nftables tables: other\n") {
		t.Errorf("cleanup: exit %d, %q", code, out)
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// The next daemon has another name for its tables. Standing permissions move to them,
// and what was revoked stays revoked.
//
// Fails when a start looks only for tables of its own name.
func TestTablesOfAnotherNameAreTakenOver(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		for name, end := range map[string]func(*scene){"killed": (*scene).kill, "kept": (*scene).stop} {
			t.Run(name, func(t *testing.T) {
				s := newScene(t, lab.Options{})
				s.Start(stage.Flags(stage.Auto, "--table=old", "--on-stop=keep", "--reconcile=1s")...)
				phone, other, proxy := s.InsideSocket(0, 5060), s.InsideSocket(0, 5061), s.PeerSocket(lab.PeerA, 5060)
				ext, revoked := s.Contact(phone, proxy), s.Contact(other, proxy)
				s.Stands(phone, proxy, ext)
				s.Stands(other, proxy, revoked)
				if out, code := s.CLI("revoke", revoked.String()); code != 0 || !strings.Contains(out, "revoked 1 ") {
					t.Fatalf("exit %d, %q", code, out)
				}
				end(s)
				s.Start(stage.Flags(mode, "--table=young", "--reconcile=1s")...)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				s.Stands(phone, proxy, ext)
				rules, err := s.Ruleset()
				if s.Must(err); strings.Contains(rules, " old ") || !strings.Contains(rules, " young ") {
					t.Errorf("tables of both daemons, or none:\n%s", rules)
				}
				if mode[0] != stage.Expect[0] { // with expectations alone nothing in the kernel records what was revoked
					s.Listed(other, proxy, revoked, "refused")
					s.Lost(other, s.PeerSocket(lab.PeerA, 5071), revoked, proxy)
				}
				s.Stop()
				if left := s.Leftovers(); len(left) > 0 {
					t.Errorf("left behind: %q", left)
				}
			})
		}
	})
}

// Another living process owns tables that look like conenatd's. They stay.
//
// Fails when such a table makes a start fail, or stops a cleanup before it removes
// ours.
func TestTablesThatAnotherProcessOwnsStay(t *testing.T) {
	s := newScene(t, lab.Options{})
	theirs, err := rules.Open(rules.Config{NetNS: s.Gateway.FD(), Name: "aaa"})
	s.Must(err)
	t.Cleanup(func() { s.Must(theirs.Close()) })
	if !theirs.Owned() {
		t.Skip("Linux before 6.9: nobody owns a table")
	}
	_, err = theirs.Set(rules.Desired{OutsideLinks: []string{"wan0"}, Guard: true})
	s.Must(err)
	s.Serve()
	s.told("table inet aaa: another process owns it")
	s.Kill()
	out, code := s.CLI("cleanup")
	if code != 1 || !strings.Contains(out, "removed nftables tables: conenat\n") || !strings.Contains(out, "table inet aaa: another process owns it") {
		t.Errorf("exit %d, %q", code, out)
	}
	all, err := s.Ruleset()
	if s.Must(err); !strings.Contains(all, "table inet aaa") || strings.Contains(all, " conenat ") {
		t.Errorf("the ruleset is\n%s", all)
	}
}
