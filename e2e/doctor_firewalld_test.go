package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// bus is the configuration of a D-Bus with one client that may do anything.
const bus = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
	<listen>unix:path=%s</listen>
	<policy context="default"><allow send_destination="*"/><allow receive_sender="*"/><allow own="*"/></policy>
</busconfig>
`

// firewalld runs Debian's firewalld in the gateway, with nothing but its defaults, and puts
// firewall-cmd into the PATH. It is unpacked and not installed, and so is its D-Bus.
func (s *scene) firewalld(t *testing.T) {
	t.Helper()
	tree := debian.ForTest(t, "firewalld", debian.UnpackAll, "firewalld", "dbus-daemon")

	dir := t.TempDir()
	path := func(name string) string { return filepath.Join(dir, name) }
	environment := []string{
		"DBUS_SYSTEM_BUS_ADDRESS=unix:path=" + path("bus"), "PYTHONHOME=" + filepath.Join(tree, "usr"),
		"GI_TYPELIB_PATH=" + filepath.Join(debian.Libs(tree)[1], "girepository-1.0"),
	}
	python := func(args ...string) []string {
		name, all := debian.Program(tree, "usr/bin/python3", args...)
		return append([]string{name}, all...)
	}
	s.Must(os.WriteFile(path("bus.conf"), fmt.Appendf(nil, bus, path("bus")), 0o644))
	s.Must(os.Mkdir(path("etc"), 0o755))
	s.Must(os.WriteFile(path("firewall-cmd"), fmt.Appendf(nil, "#!/bin/sh\nexec env %s %s \"$@\"\n",
		strings.Join(environment, " "), strings.Join(python(filepath.Join(tree, "usr/bin/firewall-cmd")), " ")), 0o755))
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))

	daemon := func(args ...string) {
		cmd := s.Gateway.Command(context.WithoutCancel(t.Context()), args[0], args[1:]...)
		cmd.Env = append(os.Environ(), environment...)
		log, err := os.Create(path(filepath.Base(args[len(args)-1])) + ".log")
		s.Must(err)
		cmd.Stdout, cmd.Stderr = log, log
		s.Must(cmd.Start())
		t.Cleanup(func() {
			s.Must(errors.Join(cmd.Process.Signal(os.Interrupt), log.Close()))
			_ = cmd.Wait() // by the signal
			if b, _ := os.ReadFile(log.Name()); t.Failed() {
				t.Logf("%s: %s", filepath.Base(log.Name()), b)
			}
		})
	}
	name, args := debian.Program(tree, "usr/bin/dbus-daemon", "--nofork", "--nopidfile", "--config-file="+path("bus.conf"))
	daemon(append([]string{name}, args...)...)
	s.Until("the bus is there", func() bool { _, err := os.Stat(path("bus")); return err == nil })
	daemon(python(filepath.Join(tree, "usr/sbin/firewalld"), "--nofork", "--nopid", "--log-target=console",
		"--default-config="+filepath.Join(tree, "usr/lib/firewalld"), "--system-config="+path("etc"))...)
	s.Until("firewalld runs", func() bool {
		_, err := s.Gateway.Output("firewall-cmd", "--state")
		if missing := (*exec.Error)(nil); errors.As(err, &missing) {
			s.Must(err)
		}
		return err == nil
	})
}

// firewalld itself takes the lines that doctor prints for it, whether the user put the links into
// zones or they are in the default one.
//
// Fails when firewall-cmd refuses a line, also the second time, and when the lines do not repair it.
func TestDoctorsLinesForFirewalldRepair(t *testing.T) {
	stage.OfTheDaemon(t)
	const trusts, translates = "firewall-cmd --permanent --zone=trusted --change-interface=lan0\n", "firewall-cmd --permanent --zone=public --add-masquerade\n"
	for name, tc := range map[string]struct{ id, lines string }{
		"no source NAT by a zone":           {noRule, trusts + "firewall-cmd --permanent --zone=work --change-interface=wan0\n"},
		"no source NAT by the default zone": {noRule, trusts},
		"no policy for zones": {blocked, "firewall-cmd --permanent --zone=internal --change-interface=lan0\n" +
			"firewall-cmd --permanent --zone=external --change-interface=wan0\n"},
		"no policy for the default zone": {blocked, translates},
		"no policy for one zone that forwards nothing": {blocked, translates + "firewall-cmd --permanent --zone=public --remove-forward\n" +
			"firewall-cmd --permanent --zone=public --change-interface=lan0\nfirewall-cmd --permanent --zone=public --change-interface=wan0\n"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &patient{newScene(t, noRules), fault{id: tc.id}, filepath.Join(t.TempDir(), "conenatd.toml")}
			p.firewalld(t)
			p.shell(tc.lines + "firewall-cmd --reload")
			p.write()
			f := p.finding()
			if f == nil {
				t.Fatalf("doctor does not find %s: %+v", tc.id, p.doctor())
			}
			if len(f.Fix) == 0 || !strings.HasPrefix(f.Fix[0].Line, "firewall-cmd ") {
				t.Fatalf("it is repaired by %+v", f)
			}
			p.noAnswer(p.InsideSocket(0, 6100), p.PeerSocket(lab.PeerA, 6100))
			p.apply(f.Fix)
			if f := p.finding(); f != nil {
				t.Fatalf("the lines do not repair it: %+v", f)
			}
			p.apply(f.Fix)
			p.Start("--config", p.config)
			p.reaches(6010, true)
		})
	}
}
