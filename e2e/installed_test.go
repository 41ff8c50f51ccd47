package e2e

import (
	"fmt"
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

// No daemon of an installed package runs. status says how to start it, or what the
// configuration lacks; the command that it gives then enables the network.
//
// Fails when status only says that nothing runs, and when its command writes what conenatd
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
			out, code := s.CLI("status")
			if got := strings.TrimRight(out, "\n"); got != tc.want || code != 1 {
				t.Fatalf("exit %d, got\n%s\nwant\n%s", code, got, tc.want)
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
