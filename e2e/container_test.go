package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const dockerfile = "../deploy/container/Dockerfile"

// runContainer runs the program of an image, whose files are in the folder $1, as "docker
// run" does with the flags of docs/recipes/container.md: in the host's network namespace,
// with a file system of its own that cannot be written, /proc/sys that cannot either, and
// two capabilities, one of them for chroot. The lab's sockets are in /tmp.
const runContainer = `#!/bin/sh
exec unshare --mount --propagation private sh -ec '
	mount --bind "$0" "$0"
	mount -t proc proc "$0/proc"
	mount --bind "$0/proc/sys" "$0/proc/sys"
	mount -o remount,bind,ro "$0/proc/sys"
	mkdir -p /run/conenatd
	mount --bind /run/conenatd "$0/run/conenatd"
	mount --bind /tmp "$0/tmp"
	mount -o remount,bind,ro "$0"
	exec setpriv --no-new-privs --bounding-set=-all,+net_admin,+sys_chroot --inh-caps=-all chroot "$0" %s "$@"
' %s "$@"
`

// An image is what a Dockerfile makes.
type image struct {
	root            string
	entrypoint, cmd []string
}

// buildImage carries out the Dockerfile, with the folder bin as context; this test knows no more
// instructions than it has.
func buildImage(t *testing.T, program string) image {
	t.Helper()
	text, err := os.ReadFile(dockerfile)
	if err != nil {
		t.Fatal(err)
	}
	i := image{root: t.TempDir()}
	for _, d := range []string{"proc", "run/conenatd", "etc/conenatd", "tmp"} { // mounts
		if err := os.MkdirAll(filepath.Join(i.root, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	words := func(s string) (out []string) {
		if err := json.Unmarshal([]byte(s), &out); err != nil {
			t.Fatalf("%s: %v", s, err)
		}
		return out
	}
	for _, m := range regexp.MustCompile(`(?m)^([A-Z]+) (.*)$`).FindAllStringSubmatch(string(text), -1) {
		switch instruction, args := m[1], m[2]; {
		case instruction == "FROM" && args == "scratch", instruction == "STOPSIGNAL" && args == "SIGTERM":
		case instruction == "COPY":
			from, to, _ := strings.Cut(args, " ")
			if from != "conenatd" {
				t.Fatalf("COPY %s: only conenatd is in the context", from)
			}
			program, err := os.ReadFile(program)
			if err != nil {
				t.Fatal(err)
			}
			to = filepath.Join(i.root, to)
			if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(to, program, 0o755); err != nil {
				t.Fatal(err)
			}
		case instruction == "ENTRYPOINT":
			i.entrypoint = words(args)
		case instruction == "CMD":
			i.cmd = words(args)
		default:
			t.Fatalf("unknown: %s", m[0])
		}
	}
	return i
}

// The image of deploy/container, without Docker but with as little around it.
//
// Fails when a peer's answer from another port does not get in, when the program needs a file
// or a capability that the container has not, when its flags are wrong, and when something
// stays in the kernel.
func TestContainer(t *testing.T) {
	s := newScene(t, lab.Options{})
	t.Setenv("CGO_ENABLED", "0")
	i := buildImage(t, stage.Build(t))
	if len(i.entrypoint) != 1 {
		t.Fatalf("entrypoint %q", i.entrypoint)
	}
	s.Must(os.WriteFile(filepath.Join(i.root, "etc/conenatd/conenatd.toml"),
		fmt.Appendf(nil, "[[subnet]]\nprefix = \"%v\"\n", lab.InsideNet), 0o644))
	s.Exe = filepath.Join(t.TempDir(), "container")
	s.Must(os.WriteFile(s.Exe, fmt.Appendf(nil, runContainer, i.entrypoint[0], i.root), 0o755))

	if i.cmd[0] != "run" {
		t.Fatalf("command %q", i.cmd)
	}
	s.Start(i.cmd[1:]...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	if out, code := s.CLI("status", "--control-socket", s.Daemon.Socket); code != 0 || !strings.HasPrefix(out, "works\n") {
		t.Errorf("status: %q, exit status %d", out, code)
	}
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left in the kernel: %q", left)
	}
}
