package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// installed runs the program where /etc has nothing but the configuration of a package, kept in
// file, and systemd does not run.
func (s *scene) installed(file string) {
	s.T.Helper()
	program := filepath.Join(s.T.TempDir(), "conenatd")
	s.Must(os.WriteFile(program, fmt.Appendf(nil, `#!/bin/sh
exec unshare --mount --propagation private sh -ec '
mount -t tmpfs none /etc; mkdir /etc/conenatd; touch /etc/conenatd/conenatd.toml
mount --bind %s /etc/conenatd/conenatd.toml; mount -t tmpfs none /run
if [ "$1" = --shell ]; then eval "$2"; else exec %s "$@"; fi' sh "$@"
`, file, s.Exe), 0o755))
	s.Exe = program
}

// No daemon of an installed package runs. status, and every other command for it, says how to start it, or
// what the configuration lacks; the command that it gives then enables the network.
//
// Fails when a command only says that nothing runs, and when that command writes what conenatd
// refuses.
func TestStatusSaysHowToStart(t *testing.T) {
	ownMode(t)
	stage.OfTheDaemon(t)
	for name, tc := range map[string]struct {
		config, want string
		arm          bool
		enables      bool
	}{
		"nothing edited": {
			config: "#lifetime = \"5m\"\n", enables: true,
			want: "conenatd: no conenatd runs in this network namespace, and /etc/conenatd/conenatd.toml enables no subnet. It would serve 10.47.11.0/24. " +
				"This enables that, and starts it:\n" +
				`  printf '\n[[subnet]]\nprefix = "%s"\n' 10.47.11.0/24 >>/etc/conenatd/conenatd.toml && conenatd run --config /etc/conenatd/conenatd.toml`,
		},
		"no likely network": {
			arm: true, want: "conenatd: no conenatd runs in this network namespace: /etc/conenatd/conenatd.toml enables no subnet, and none looks like an inside network: " +
				`name yours there in a [[subnet]], then start it with "conenatd run --config /etc/conenatd/conenatd.toml"`,
		},
		"enabled": {
			config: "[[subnet]]\nprefix = \"10.47.11.0/24\"\n",
			want:   `conenatd: no conenatd runs in this network namespace: start it with "conenatd run --config /etc/conenatd/conenatd.toml"`,
		},
		"mistyped": {
			config: "lifetme = \"5m\"\n",
			want:   "conenatd: no conenatd runs in this network namespace, and would not start: /etc/conenatd/conenatd.toml:1:1: lifetme: unknown key; did you mean lifetime?",
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{})
			if tc.arm {
				s.oneArm()
			}
			file := filepath.Join(t.TempDir(), "conenatd.toml")
			s.Must(os.WriteFile(file, []byte(tc.config), 0o644))
			program := s.Exe
			s.installed(file)
			out := ""
			for _, command := range []string{"list", "reload", "status"} {
				code := 0
				out, code = s.CLI(command)
				if got := strings.TrimRight(out, "\n"); got != tc.want || code != 1 {
					t.Fatalf("%s: exit %d, got\n%s\nwant\n%s", command, code, got, tc.want)
				}
			}
			if !tc.enables {
				return
			}
			line := out[strings.LastIndex(strings.TrimSpace(out), "\n"):]
			write, _, _ := strings.Cut(line, "&&")
			if out, code := s.CLI("--shell", write); code != 0 {
				t.Fatalf("exit %d: %s", code, out)
			}
			s.Exe = program
			s.Start("--config", file)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			s.Stands(phone, proxy, s.Contact(phone, proxy))
		})
	}
}

// No daemon of an installed package runs. Without flags doctor examines what its configuration says,
// and has the line that starts it.
//
// Fails when doctor takes the defaults in place of the configuration, when it is content although the
// service does not run, when it says another line than status, and when it keeps silent of networks
// that are left out.
func TestDoctorTakesTheInstalledConfiguration(t *testing.T) {
	ownMode(t)
	stage.OfTheDaemon(t)
	for name, tc := range map[string]struct {
		config, id, line, what string
		args                   []string
		status                 int
	}{
		"enabled": {
			config: insideSubnet, id: "not_running", status: 2, line: "conenatd run --config /etc/conenatd/conenatd.toml",
		},
		"nothing edited": {
			id: "no_subnet", status: 2, what: "takes 10.47.11.0/24 for enabled",
			line: `printf '\n[[subnet]]\nprefix = "%s"\n' 10.47.11.0/24 >>/etc/conenatd/conenatd.toml && conenatd run --config /etc/conenatd/conenatd.toml`,
		},
		"no likely network": {
			config: "outside = [\"wan0\", \"lan0\"]\n", id: "no_subnet", status: 2, what: "left out: 10.0.3.0/24 on lxcbr0",
		},
		"flags": {
			config: "lifetme = 1\n", args: []string{"--subnet=10.47.11.0/24"},
		},
		"mistyped": {
			config: "lifetme = 1\n", status: 78, what: "/etc/conenatd/conenatd.toml:1:1: lifetme: unknown key; did you mean lifetime?",
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := &patient{scene: newScene(t, lab.Options{Rules: lab.Masquerade + acceptsBoth}), config: filepath.Join(t.TempDir(), "conenatd.toml")}
			p.IP(p.Gateway, "link add lxcbr0 type bridge")
			p.IP(p.Gateway, "addr add 10.0.3.1/24 dev lxcbr0")
			p.Must(os.WriteFile(p.config, []byte(tc.config), 0o644))
			program := p.Exe
			p.installed(p.config)
			out, code := p.CLI(append([]string{"doctor"}, tc.args...)...)
			if code != tc.status || !strings.Contains(strings.Join(strings.Fields(out), " "), tc.what) || !strings.Contains(out, tc.id) || !strings.Contains(out, tc.line) {
				t.Fatalf("exit %d: %s", code, out)
			}
			if out, _ := p.CLI("doctor", "--json"); strings.Contains(tc.line, "&&") && !strings.Contains(out, " && ") {
				t.Errorf("a line cannot be copied from JSON: %s", out)
			}
			if tc.id == "not_running" {
				p.Exe = program
				p.Start("--config", p.config)
				if f := p.doctor().Findings; len(f) > 0 {
					t.Errorf("with a daemon: %+v", f)
				}
			}
		})
	}
}

// Fails when a user who may not read the configuration is told that the daemon would not start.
func TestStatusSaysThatTheConfigurationCannotBeRead(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{})
	s.Must(os.Chmod(filepath.Dir(s.Exe), 0o755))
	file := filepath.Join(t.TempDir(), "conenatd.toml")
	s.Must(os.WriteFile(file, []byte("[[subnet]]\nprefix = \"10.47.11.0/24\"\n"), 0o600))
	program := s.Exe
	s.installed(file)
	out, _ := s.CLI("--shell", "setpriv --reuid=65534 --regid=65534 --clear-groups "+program+" status || true")
	if !strings.Contains(out, "run as root to be told how to start it: /etc/conenatd/conenatd.toml") || strings.Contains(out, "would not start") {
		t.Error(out)
	}
}

// Fails when status does not say that tables of a dead daemon go on dropping packets.
func TestStatusSaysWhatADeadDaemonLeft(t *testing.T) {
	ownMode(t)
	s := play(t, lab.Options{}, stage.Auto...)
	s.Kill()
	if out, code := s.CLI("status"); code != 1 || !strings.Contains(out, `a dead daemon left the tables conenat: a start takes them over, and "conenatd cleanup" removes them`) {
		t.Errorf("exit %d, %q", code, out)
	}
}

// run without a subnet, and a daemon whose subnet is "auto", say which networks they leave out.
//
// Fails when a network is left out without a word, and when one that is served is named.
func TestNetworksThatAreLeftOutAreNamed(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{})
	s.IP(s.Gateway, "link add docker0 type bridge")
	s.IP(s.Gateway, "address add 172.17.0.1/16 dev docker0")
	s.IP(s.Gateway, "link add pair0 type veth peer name pair1")
	s.IP(s.Gateway, "address add 10.99.0.1/24 dev pair0")
	const bridge = "172.17.0.0/16 on docker0, which has the name of a link of containers or virtual machines"
	const pair = "10.99.0.0/24 on pair0, a link of kind veth, as tunnels, containers or virtual machines have"
	if out, code := s.CLI("run"); code != 78 || !strings.HasSuffix(strings.TrimSpace(out), "--subnet auto\nleft out: "+bridge+"\nleft out: "+pair) {
		t.Errorf("exit %d, %q", code, out)
	}
	s.Start("--subnet=auto")
	if out := s.Daemon.Output(); !strings.Contains(out, "networks=\"["+bridge+" "+pair+"]\"") {
		t.Error(out)
	}
}

// Fails when revoke refuses a prefix that list prints, and when it ends the permissions of others.
func TestRevokeTakesPrefixes(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{})
	s.configured("peer_groups = [\"203.0.113.0/24\"]\n" + toml(stage.Auto))
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.standsFor(netip.MustParsePrefix("203.0.113.0/24"), phone, ext)
	for _, tc := range []struct{ word, want string }{
		{"203.0.113.0/25", "revoked 0 "}, {"192.0.2.0/24", "revoked 0 "}, {"203.0.113.0/24", "revoked 1 "},
	} {
		if out, code := s.CLI("revoke", tc.word); code != 0 || !strings.HasPrefix(out, tc.want) {
			t.Errorf("%s: exit %d, %q", tc.word, code, out)
		}
	}
	s.Lost(phone, s.PeerSocket(lab.PeerA, 5061), ext, proxy)
}
