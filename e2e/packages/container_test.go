package packages

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
)

// bound limits each command in a container, and its boot.
const bound = 2 * time.Minute

// tools are the required programs and their Debian packages.
var tools = [][2]string{
	{"mmdebstrap", "mmdebstrap"}, {"systemd-nspawn", "systemd-container"}, {"nsenter", "util-linux"}, {"git", "git"},
}

// need skips the test unless "make packages-test" started it.
func need(t *testing.T) {
	t.Helper()
	if os.Getenv("CONENATD_PACKAGES") == "" {
		t.Skip(`run "make packages-test"`)
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool[0]); err != nil {
			debian.Missing(t, fmt.Sprintf("%s not found: install the Debian package %s", tool[0], tool[1]))
		}
	}
}

// included are the packages of the containers beside Debian's basic ones.
const included = "systemd-sysv,nftables,rpm"

// debianRoot returns a tar archive of a Debian 12 with systemd and rpm. It is made once and kept in
// the user's cache.
func debianRoot(t *testing.T) string {
	t.Helper()
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(cache, "conenatd", "packages", "bookworm,"+included+".tar")
	if _, err := os.Stat(path); err == nil {
		return path
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	fresh := fmt.Sprintf("%s.%d.tar", path, os.Getpid())
	defer os.Remove(fresh)
	run(t, "", nil, "mmdebstrap", "--quiet", "--variant=apt", "--include="+included, "bookworm", fresh)
	if err := os.Rename(fresh, path); err != nil {
		t.Fatal(err)
	}
	return path
}

// run runs a program in a folder, with more environment, and returns its output.
func run(t *testing.T, dir string, env []string, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("run %s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// A container is a Debian 12.
type container struct {
	t    *testing.T
	root string // its files, seen from outside
	init string // process id of its first process
}

// boot starts a container with systemd in the gateway of a lab. It ends with the test.
// packages is a folder that the container sees as /packages.
func boot(t *testing.T, s *stage.Scene, packages string) *container {
	t.Helper()
	c := start(t, s, packages, "test -S /run/systemd/private", "--boot")
	// "degraded" is enough: units that have nothing to do with conenatd may fail in a container.
	if out, _ := c.try("systemctl is-system-running --wait"); !strings.Contains(out, "running") && !strings.Contains(out, "degraded") {
		t.Fatalf("systemd is %s", out)
	}
	return c
}

// withoutSystemd is boot, but the first process is a small one of systemd-nspawn's, which
// collects dead processes, as in many containers and chroots.
func withoutSystemd(t *testing.T, s *stage.Scene, packages string) *container {
	t.Helper()
	// systemd-nspawn's first child only prepares the container, and ends before the program runs.
	return start(t, s, packages, "test -d /packages && cat /proc/[0-9]*/comm | grep -qx sleep", "--as-pid2", "/bin/sleep", "infinity")
}

// start starts a container whose first process is what the last arguments of systemd-nspawn
// say, and waits until a command succeeds in it.
func start(t *testing.T, s *stage.Scene, packages, ready string, first ...string) *container {
	t.Helper()
	tar := debianRoot(t)
	c := &container{t: t, root: t.TempDir()}
	run(t, "", nil, "tar", "-C", c.root, "-xf", tar)
	namespace := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.Gateway.FD())
	// Not t.Context: it ends before the clean-up.
	nspawn := exec.Command("systemd-nspawn", append([]string{
		"--quiet", "--register=no", "--keep-unit", "--console=pipe",
		"--machine=" + fmt.Sprintf("conenatd-%d", os.Getpid()), "--directory=" + c.root, "--bind-ro=" + packages + ":/packages",
		"--network-namespace-path=" + namespace, "--capability=CAP_NET_ADMIN", "--resolv-conf=off", "--timezone=off",
	}, first...)...)
	var log bytes.Buffer
	nspawn.Stdout, nspawn.Stderr = &log, &log
	if err := nspawn.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() { _ = nspawn.Wait(); close(ended) }()
	t.Cleanup(func() {
		if init, err := strconv.Atoi(c.init); err == nil {
			_ = unix.Kill(init, unix.SIGKILL) // and all processes of its namespace
		}
		_ = nspawn.Process.Kill()
		<-ended
		if t.Failed() {
			t.Logf("console:\n%s", log.String())
		}
	})
	children := fmt.Sprintf("/proc/%d/task/%d/children", nspawn.Process.Pid, nspawn.Process.Pid)
	s.UntilIn(bound, "the container runs", func() bool {
		select {
		case <-ended:
			t.Fatalf("systemd-nspawn ended: %s", log.String())
		default:
		}
		b, err := os.ReadFile(children)
		if c.init = strings.TrimSpace(string(b)); err != nil || c.init == "" {
			return false
		}
		_, err = c.try(ready)
		return err == nil
	})
	return c
}

// try runs a shell command in the container.
func (c *container) try(command string) (string, error) {
	ctx, cancel := context.WithTimeout(c.t.Context(), bound)
	defer cancel()
	out, err := exec.CommandContext(ctx, "nsenter", "--target", c.init, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd",
		"env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND=noninteractive", "/bin/sh", "-c", command).CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		c.t.Fatal(err)
	}
	return strings.TrimSpace(string(out)), err
}

// do is try, but the command must succeed.
func (c *container) do(command string) string {
	c.t.Helper()
	out, err := c.try(command)
	if err != nil {
		c.t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}
