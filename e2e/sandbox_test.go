package e2e

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const unit = "../deploy/systemd/conenatd.service"

// unitSetting returns the words of one setting in the unit.
func unitSetting(t *testing.T, name string) []string {
	t.Helper()
	b, err := os.ReadFile(unit)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if words, ok := strings.CutPrefix(line, name+"="); ok {
			return strings.Fields(words)
		}
	}
	t.Fatalf("%s does not set %s", unit, name)
	return nil
}

// systemCalls returns the system calls of one of systemd's filter sets, including those
// of nested sets.
func systemCalls(t *testing.T, set string) map[string]bool {
	t.Helper()
	all := make(map[string]bool)
	for open := []string{set}; len(open) > 0; {
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", append([]string{"syscall-filter", "--no-pager"}, open...)...).Output()
		if err != nil {
			t.Fatalf("systemd-analyze, of the Debian package systemd: %v", err)
		}
		open = nil
		for line := range strings.Lines(string(out)) {
			name := strings.TrimSpace(line)
			switch {
			case !strings.HasPrefix(line, " ") || name == "" || strings.HasPrefix(name, "#"):
			case strings.HasPrefix(name, "@"):
				open = append(open, name)
			default:
				all[name] = true
			}
		}
	}
	return all
}

// traced is a program that runs conenatd, without the race detector, under strace, which
// writes the system calls into file.
func (s *scene) traced(file string) string {
	s.T.Helper()
	path := filepath.Join(s.T.TempDir(), "traced")
	s.Must(os.WriteFile(path, fmt.Appendf(nil, "#!/bin/sh\nexec strace -D -f -qq -o %s -- %s \"$@\"\n", file, stage.Plain(s.T)), 0o755))
	return path
}

var (
	systemCall = regexp.MustCompile(`^\d+ +(?:<\.\.\. )?([a-z_0-9]+)[ (]`)
	family     = regexp.MustCompile(` socket\((AF_[A-Z0-9]+),`)
)

// The unit's sandbox allows everything that the daemon does: each system call of a full
// life is in the unit's list and is not removed by the unit's other settings, and its
// socket families are allowed.
//
// Fails with the set @basic-io for @system-service, and without AF_INET in the unit.
func TestUnitAllowsWhatTheDaemonCalls(t *testing.T) {
	stage.OfTheDaemon(t)
	t.Setenv("WATCHDOG_USEC", "100000")
	trace := filepath.Join(t.TempDir(), "trace")
	s := newScene(t, lab.Options{IPv6: true, Inside: 2})
	own := s.Exe
	s.Exe = s.traced(trace)
	config := filepath.Join(t.TempDir(), "conenatd.toml")
	write := func(text string) { s.Must(os.WriteFile(config, []byte(text), 0o644)) }
	inside := "metrics_listen = \"127.0.0.1:9469\"\nreconcile = \"1s\"\n[[subnet]]\nprefix = \"10.47.11.0/24\"\nmapping = \"endpoint_independent\"\n[[subnet]]\nprefix = \"2001:db8:47::/64\"\nrouted = true\n"
	write(inside)
	s.Start("--config", config)
	s.Exe = own
	control := func(args ...string) {
		if out, code := s.CLI(append(args, "--control-socket", s.Daemon.Socket)...); code != 0 {
			t.Errorf("%q: exit %d, %s", args, code, out)
		}
	}
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.IP(s.Gateway, "address add 198.51.100.3/24 dev wan0")
	for _, hand := range []string{"-F", "-F expect"} {
		_, err := s.Gateway.Output("conntrack", strings.Fields(hand)...)
		s.Must(err)
	}
	s.Until("it is whole again", func() bool {
		_, code := s.CLI("status", "--verify", "--control-socket", s.Daemon.Socket)
		return code == 0
	})
	write("backend = \"nft\"\n" + inside)
	control("reload")
	write("backend = \"expect\"\npeer_groups = [\"203.0.113.4/30\"]\n" + inside)
	control("reload")
	control("list")
	s.metrics("127.0.0.1:9469")
	control("revoke", "10.47.11.109")
	s.Stop()
	var text string
	s.Until("the trace has its end", func() bool {
		b, err := os.ReadFile(trace)
		s.Must(err)
		text = string(b)
		return strings.Contains(text, " exit_group(")
	})

	allowed := make(map[string]bool)
	for _, set := range unitSetting(t, "SystemCallFilter") {
		for name := range systemCalls(t, set) {
			allowed[name] = true
		}
	}
	for _, set := range []string{"@clock", "@module", "@raw-io"} { // ProtectClock, ProtectKernelModules, PrivateDevices
		for name := range systemCalls(t, set) {
			delete(allowed, name)
		}
	}
	for _, name := range []string{"personality", "setns", "unshare", "syslog"} { // LockPersonality, RestrictNamespaces, ProtectKernelLogs
		delete(allowed, name)
	}
	families := unitSetting(t, "RestrictAddressFamilies")
	made := make(map[string]bool)
	for line := range strings.Lines(text) {
		call := systemCall.FindStringSubmatch(line)
		if call == nil {
			continue
		}
		made[call[1]] = true
		if !allowed[call[1]] {
			t.Errorf("the unit does not allow: %s", line)
		}
		if f := family.FindStringSubmatch(line); f != nil && !slices.Contains(families, f[1]) {
			t.Errorf("the unit does not allow this family: %s", line)
		}
		if strings.Contains(line, "PROT_WRITE") && strings.Contains(line, "PROT_EXEC") {
			t.Errorf("the unit does not allow memory to write and execute: %s", line)
		}
	}
	t.Logf("%d system calls", len(made))
	if !made["recvmsg"] && !made["recvfrom"] || !made["socket"] || !made["capset"] {
		t.Errorf("this is no trace of a daemon: %v", made)
	}
}
