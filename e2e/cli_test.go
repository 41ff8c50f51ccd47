package e2e

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

func itoa(n uint16) string { return strconv.Itoa(int(n)) }

func replacePort(ap netip.AddrPort, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(ap.Addr(), port)
}

func TestSecondDaemonRefusesAndNamesTheFirst(t *testing.T) {
	s := play(t, lab.Options{})
	socket := filepath.Join(t.TempDir(), "other.sock")
	out, code := s.CLI("run", "--subnet", lab.InsideNet.String(), "--control-socket", socket)
	if code != 1 || !strings.Contains(out, fmt.Sprintf("pid %d", s.Daemon.PID())) {
		t.Errorf("exit %d, %q", code, out)
	}
	s.Status() // the first one goes on
}

func TestRunWithoutSubnetNamesTheCandidates(t *testing.T) {
	s := newScene(t, lab.Options{})
	for dev, addr := range map[string]string{"docker0": "172.17.0.1/16", "lan1": "10.47.13.1/24"} {
		for _, args := range [][]string{
			{"link", "add", dev, "type", "bridge"},
			{"address", "add", addr, "dev", dev},
			{"link", "set", dev, "up"},
		} {
			_, err := s.Gateway.Output("ip", args...)
			s.Must(err)
		}
	}
	out, code := s.CLI("run")
	if code != 78 || !strings.Contains(out, "conenatd run --subnet 10.47.11.0/24 --subnet 10.47.13.0/24\n") ||
		!strings.Contains(out, "--subnet auto") {
		t.Errorf("exit %d, %q", code, out)
	}
	s.Start("--subnet", "auto")
	var got []string
	for _, n := range s.Status().Subnets {
		got = append(got, n.Prefix.String())
	}
	if want := "10.47.11.0/24 10.47.13.0/24"; strings.Join(got, " ") != want {
		t.Errorf("enabled %q, want %q", got, want)
	}
}

func TestWrongInputIsNamedAndChangesNothing(t *testing.T) {
	s := newScene(t, lab.Options{})
	before := s.netfilter()
	dir := t.TempDir()
	file := func(text string) string {
		path := filepath.Join(dir, "c.toml")
		s.Must(os.WriteFile(path, []byte(text), 0o644))
		return path
	}
	open := filepath.Join(t.TempDir(), "open.toml")
	s.Must(os.WriteFile(open, []byte("backend = \"expect\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\nfiltering = \"endpoint_independent\"\n"), 0o644))
	for name, tc := range map[string]struct {
		args []string
		code int
		want string
	}{
		"backend, checked": {[]string{"check", open}, 0, "open.toml: good, but with backend = \"expect\" the subnet 10.47.11.0/24 gets address_dependent filtering"},
		"wrong value":      {[]string{"run", "--config", file("# x\nlifetime = \"5 minutes\"\n")}, 78, "c.toml:2:12: lifetime: expected a duration"},
		"missing file":     {[]string{"run", "--config", filepath.Join(dir, "none.toml")}, 1, "none.toml"},
		"host bits":        {[]string{"run", "--subnet", "10.47.11.1/24"}, 78, `did you mean "10.47.11.0/24"`},
		"contradiction":    {[]string{"run", "--subnet", "10.47.11.0/24", "--hairpin"}, 78, "hairpin: expected a subnet with mapping"},
		"unknown flag":     {[]string{"run", "--bogus"}, 78, "--bogus"},
		"unknown topic":    {[]string{"help", "bogus"}, 78, `unknown command "bogus"`},
		"unknown shell":    {[]string{"completion", "tcsh"}, 78, "expected bash, zsh or fish"},
		"revoke, a name":   {[]string{"revoke", "phone"}, 78, `revoke "phone": expected an address`},
		"status, no one":   {[]string{"status"}, 1, "no conenatd runs in this network namespace"},
		"check, bad file":  {[]string{"check", file("backend = 7\n")}, 78, "c.toml:1:11: backend:"},
		"list, no one":     {[]string{"list"}, 1, "conenatd run"},
		"stop, no one":     {[]string{"stop"}, 0, "no conenatd runs in this network namespace\n"},
		"cleanup, nothing": {[]string{"cleanup"}, 0, "removed 0 expectations"},
	} {
		t.Run(name, func(t *testing.T) {
			if strings.HasPrefix(name, "wrong") { // each case has its own file
				file("# x\nlifetime = \"5 minutes\"\n")
			} else if strings.HasPrefix(name, "check") {
				file("backend = 7\n")
			}
			out, code := s.CLI(tc.args...)
			if code != tc.code || !strings.Contains(out, tc.want) {
				t.Errorf("exit %d, %q; want %d and %q", code, out, tc.code, tc.want)
			}
		})
	}
	for k, v := range s.netfilter() {
		if before[k] != v {
			t.Errorf("sysctl %s changed", k)
		}
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left in the kernel: %q", left)
	}
}

func TestMissingPrivilegeNamesTheFix(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.Must(os.Chmod(filepath.Dir(s.Exe), 0o755))
	c := s.Gateway.Command(t.Context(), s.Exe, "run", "--subnet", "10.47.11.0/24",
		"--control-socket", filepath.Join(t.TempDir(), "c.sock"))
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := c.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "CAP_NET_ADMIN") {
		t.Errorf("%v: %q", err, out)
	}
}

// Fails when root is not told which of its capabilities conenatd lacks for what it is to open.
func TestRootIsToldWhatItCannotOpen(t *testing.T) {
	s := newScene(t, lab.Options{})
	foreign := t.TempDir()
	s.Must(os.Chown(foreign, 65534, 65534))
	for flag, want := range map[string]string{
		"--control-socket=" + foreign + "/c.sock":        "keeps CAP_NET_ADMIN alone",
		"--control-socket=" + foreign + "/folder/c.sock": "keeps CAP_NET_ADMIN alone",
		"--audit-log=" + foreign + "/audit.log":          "make its folder writable for conenatd",
		"--metrics-listen=127.0.0.1:80":                  "has no CAP_NET_BIND_SERVICE",
	} {
		out, code := s.CLI("run", "--subnet="+lab.InsideNet.String(), flag)
		if code == 0 || !strings.Contains(out, want) || strings.Count(out, "\n") != 1 {
			t.Errorf("%s: exit status %d, %q", flag, code, out)
		}
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left in the kernel: %q", left)
	}
}

// Fails when a user without privileges is told that nothing is left, or not what he needs.
func TestCommandsWithoutPrivilegeNameIt(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.Start("--subnet", lab.InsideNet.String())
	s.Must(os.Chmod(filepath.Dir(s.Exe), 0o755))
	nobody := func(command, want string) {
		t.Helper()
		c := s.Gateway.Command(t.Context(), s.Exe, command)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		out, err := c.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) || strings.Contains(string(out), "removed") {
			t.Errorf("%s: %v, %q, want %q", command, err, out, want)
		}
	}
	nobody("status", "run as root, or as a member of the group of")
	nobody("stop", "run as root, or as the user of pid")
	s.Kill()
	nobody("cleanup", "run as root or with CAP_NET_ADMIN")
}

func TestListAndStatus(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)

	out, code := s.CLI("list", "--control-socket", s.Daemon.Socket)
	if code != 0 || !strings.Contains(out, "10.47.11.109:5060") || !strings.Contains(out, "198.51.100.1:5060") ||
		!strings.Contains(out, "203.0.113.5") {
		t.Errorf("list: exit %d\n%s", code, out)
	}
	out, code = s.CLI("list", "--json", "--control-socket", s.Daemon.Socket)
	var p struct{ Int, Ext, Peer, State string }
	if err := json.Unmarshal([]byte(out), &p); code != 0 || err != nil || p.Int != "10.47.11.109:5060" || p.State != "standing" {
		t.Errorf("list --json: exit %d, %v\n%s", code, err, out)
	}
	out, code = s.CLI("status", "--control-socket", s.Daemon.Socket)
	if code != 0 || !strings.Contains(out, "10.47.11.0/24") || !strings.Contains(out, "expect") {
		t.Errorf("status: exit %d\n%s", code, out)
	}
	out, code = s.CLI("status", "--json", "--control-socket", s.Daemon.Socket)
	if code != 0 || !json.Valid([]byte(out)) || strings.Contains(out, "null") {
		t.Errorf("status --json: exit %d\n%s", code, out)
	}
}

func TestDemoShowsTheDifference(t *testing.T) {
	s := newScene(t, lab.Options{}) // any namespace will do
	out, code := s.CLI("demo")
	if code != 0 {
		t.Fatalf("exit %d\n%s", code, out)
	}
	without, with, ok := strings.Cut(out, "With conenatd")
	if !ok || strings.Contains(without, "ARRIVES") || strings.Count(with, "ARRIVES") != 1 ||
		!strings.Contains(with, "another address: lost") || !strings.Contains(with, "PERMANENT") {
		t.Errorf("the demo says\n%s", out)
	}
}

func TestSelftestPassesOnThisKernel(t *testing.T) {
	t.Parallel()                    // mostly it waits
	s := newScene(t, lab.Options{}) // any namespace will do
	out, code := s.CLI("selftest")
	t.Log(out)
	if code != 0 || strings.Contains(out, "FAIL") || strings.Contains(out, "none") || strings.Count(out, "pass  ") < 20 {
		t.Errorf("exit %d", code)
	}
}

// The selftest reports what passes and fails with stock Linux and each configuration of ours.
func TestSelftestKnowsRFC4787(t *testing.T) {
	t.Parallel()                    // mostly it waits
	s := newScene(t, lab.Options{}) // any namespace will do
	out, code := s.CLI("selftest", "--rfc4787")
	const (
		always = "REQ-3a REQ-4 REQ-6 REQ-10 REQ-12 REQ-13 REQ-14"
		ours   = always + " REQ-5 REQ-8 REC-11 REC-14"
		all    = ours + " REQ-1 REQ-3 REQ-9 REQ-11"
	)
	want := []struct{ passes, filtering string }{
		{always, "address and port-dependent: the peer is let in from one port"},
		{ours, "address-dependent: the peer is let in from any port, nobody else"},
		{ours, "endpoint-independent: anybody is let in"},
		{all, "address-dependent: the peer is let in from any port, nobody else"},
	}
	var got int
	for section := range strings.SplitSeq("\n"+out, ":\n  ") {
		if !strings.HasPrefix(section, "fail ") && !strings.HasPrefix(section, "pass ") {
			continue
		}
		if got++; got > len(want) {
			break
		}
		w := want[got-1]
		for line := range strings.Lines(section) {
			verdict, text, _ := strings.Cut(strings.TrimSpace(line), "  ")
			name, _, _ := strings.Cut(strings.TrimPrefix(text, "RFC 6092 "), " ")
			if verdict != "pass" && verdict != "fail" {
				continue // not applicable, or the next configuration
			}
			if passes := slices.Contains(strings.Fields(w.passes), name); passes != (verdict == "pass") {
				t.Errorf("configuration %d: %s", got, line)
			}
			if name == "REQ-8" && !strings.Contains(line, w.filtering) {
				t.Errorf("configuration %d: want %s: %s", got, w.filtering, line)
			}
		}
	}
	if code != 0 || got != len(want) {
		t.Errorf("exit %d\n%s", code, out)
	}
}

func TestForeignTableIsLeftAloneAndNamed(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + "table inet conenat {\n\tchain mine {\n\t}\n}\n"})
	before, err := s.Ruleset()
	s.Must(err)
	out, code := s.CLI("run", "--subnet", lab.InsideNet.String(), "--control-socket", filepath.Join(t.TempDir(), "c.sock"))
	if code != 1 || !strings.Contains(out, "table inet conenat") || !strings.Contains(out, `key "table"`) {
		t.Errorf("exit %d, %q", code, out)
	}
	s.Start("--subnet", lab.InsideNet.String(), "--table", "conenat2")
	s.Stop()
	if after, err := s.Ruleset(); err != nil || after != before {
		t.Errorf("the rule set is %v\n%s\nnot\n%s", err, after, before)
	}
}
