package packages

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// build makes the packages of a version for amd64 from a checkout.
func build(t *testing.T, checkout, version, dir string) {
	t.Helper()
	run(t, checkout, []string{"VERSION=" + version, "SOURCE_DATE_EPOCH=1700000000"}, "scripts/packages", dir, "amd64")
}

// The same files in another folder give the same bytes.
//
// Fails without -trimpath, and when scripts/mod32 prints an absolute replacement.
func TestPackagesAreReproducible(t *testing.T) {
	need(t)
	one, two, copied := t.TempDir(), t.TempDir(), t.TempDir()
	files := run(t, "../..", nil, "git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
	for name := range strings.SplitSeq(strings.TrimSuffix(files, "\x00"), "\x00") {
		b, err := os.ReadFile(filepath.Join("../..", name))
		if os.IsNotExist(err) {
			continue // deleted, but not committed yet
		}
		mode := os.FileMode(0o644)
		if strings.HasPrefix(name, "scripts/") {
			mode = 0o755
		}
		if err == nil {
			err = os.MkdirAll(filepath.Join(copied, filepath.Dir(name)), 0o755)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(copied, name), b, mode)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	build(t, "../..", "v0.0.1", one)
	build(t, copied, "v0.0.1", two)
	sums := func(dir string) string {
		b, err := os.ReadFile(filepath.Join(dir, "SHA256SUMS"))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	if a, b := sums(one), sums(two); a != b || strings.Count(a, "\n") != 4 {
		t.Errorf("first\n%s\nsecond\n%s", a, b)
	}
}

func TestPackagePassesLintian(t *testing.T) {
	need(t)
	if _, err := exec.LookPath("lintian"); err != nil {
		debian.Missing(t, "lintian not found: install the Debian package lintian")
	}
	dir := t.TempDir()
	build(t, "../..", "v0.0.1", dir)
	out := run(t, "", nil, "lintian", "--allow-root", "--fail-on=none",
		"--suppress-tags=initial-upload-closes-no-bugs", filepath.Join(dir, "conenatd_0.0.1-1_amd64.deb"))
	if out != "" {
		t.Error(out)
	}
}

// A package is installed, enabled by the command that status gives, upgraded below traffic,
// removed and purged.
//
// Fails when status does not name the subnet and a command that enables it, when postinst restarts without SIGUSR1, when prerm or postrm does nothing, when the
// unit has no folder for the audit log, and when the journal gets no priorities.
func TestPackageOnDebian(t *testing.T) {
	need(t)
	s := stage.New(t, lab.Options{})
	rules := ruleset(s)
	dir := t.TempDir()
	build(t, "../..", "v0.0.1", dir)
	build(t, "../..", "v0.0.2", dir)
	c := boot(t, s, dir)
	traces := c.traces()

	if out := c.do("apt-get install --yes /packages/conenatd_0.0.1-1_amd64.deb 2>&1"); !strings.Contains(out, nextStep) {
		t.Errorf("the first installation does not tell the next step:\n%s", out)
	}
	if state, _ := c.try("systemctl is-enabled conenatd; systemctl is-active conenatd"); state != "disabled\ninactive" {
		t.Errorf("the service is %s", state)
	}
	c.do("cd /usr/share && zcat man/man8/conenatd.8.gz man/man5/conenatd.toml.5.gz | grep -q '^.TH' && test -s conenatd/conenatd.schema.json && " +
		"test -s zsh/vendor-completions/_conenatd && test -s fish/vendor_completions.d/conenatd.fish && bash -n bash-completion/completions/conenatd")
	if now := ruleset(s); now != rules {
		t.Errorf("the installation changed the rules to\n%s", now)
	}

	// Nothing was edited yet.
	out, err := c.try("conenatd status")
	enable, ok := "", strings.Contains(out, "It would serve 10.47.11.0/24. ")
	if i := strings.LastIndex(out, "\n  "); i >= 0 {
		enable = strings.TrimSpace(out[i:])
	}
	if err == nil || !ok || enable == "" {
		t.Fatalf("%v: status does not say what it would serve, or how:\n%s", err, out)
	}
	c.do(enable)
	if out := c.do("systemctl is-enabled conenatd; conenatd status"); !strings.HasPrefix(out, "enabled\nworks\n") || !strings.Contains(out, "10.47.11.0/24") {
		t.Errorf("after %q:\n%s", enable, out)
	}
	c.do("sed -i '1i max_children = 0\\naudit_log = \"/var/log/conenatd/audit.log\"' /etc/conenatd/conenatd.toml && systemctl restart conenatd")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	child := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, child, ext)
	c.until("grep -q child_begin /var/log/conenatd/audit.log")
	c.until("journalctl --unit conenatd --priority 6..6 --output cat | grep -q '^msg=.conenatd runs. '")
	before := c.do("systemctl show --property=MainPID conenatd")
	if out, err := c.try("conenatd run --subnet 10.47.11.0/24"); err == nil || !strings.Contains(out, "conenatd is already running") {
		t.Errorf("a second daemon, of root: %v\n%s", err, out)
	}

	stop := s.Steady(paced(s.FreshPorts(phone, lab.PeerA, ext)))
	out = c.do("dpkg --install /packages/conenatd_0.0.2-1_amd64.deb 2>&1")
	c.do("systemctl is-active conenatd")
	s.Arrives(phone, child, ext)
	if n := stop(); n == 0 {
		t.Error("no packet was sent during the upgrade")
	}
	if after := c.do("systemctl show --property=MainPID conenatd"); after == before || after == "MainPID=0" {
		t.Errorf("before the upgrade %s, then %s\n%s", before, after, out)
	}
	if v := c.do("conenatd version"); v != "conenatd v0.0.2" {
		t.Errorf("installed: %s", v)
	}
	if b := c.do("cat /etc/conenatd/conenatd.toml"); !strings.Contains(b, "10.47.11.0/24") {
		t.Errorf("the upgrade replaced the configuration:\n%s", b)
	}

	if out, err := c.try("journalctl --unit conenatd --output cat | grep 'permission denied'"); err == nil {
		t.Errorf("root's attempt to run a second daemon took something from the first one:\n%s", out)
	}

	// With on_stop = "keep" a removal must take away what the stop leaves.
	c.do("sed -i '1i on_stop = \"keep\"' /etc/conenatd/conenatd.toml && systemctl reload conenatd")
	c.do("dpkg --remove conenatd 2>&1")
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("the removal left in the kernel: %q", left)
	}
	if now := ruleset(s); now != rules {
		t.Errorf("the removal left the rules\n%s", now)
	}
	c.do("test -f /etc/conenatd/conenatd.toml")
	c.do("dpkg --purge conenatd 2>&1")
	if left := c.traces(); left != traces {
		t.Errorf("after the purge:\n%s\nbefore the installation:\n%s", left, traces)
	}
}

// Where systemd is not PID 1, a removal stops the daemon that somebody started by hand. A
// user or a group that was there before the package survives a purge.
//
// Fails when prerm leaves the daemon alone without systemd, when postrm deletes a user or a
// group that postinst did not make, and when a failure of userdel ends postrm.
func TestPackageWithoutSystemd(t *testing.T) {
	need(t)
	s := stage.New(t, lab.Options{})
	rules := ruleset(s)
	dir := t.TempDir()
	build(t, "../..", "v0.0.1", dir)
	build(t, "../..", "v0.0.2", dir)
	c := withoutSystemd(t, s, dir)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	for _, before := range []string{
		"true",
		"useradd --system --user-group conenatd",
		"groupadd --system conenatd",
		"useradd --system --no-user-group --gid nogroup conenatd",
	} {
		c.do(before)
		traces := c.traces()
		out := c.do("dpkg --install /packages/conenatd_0.0.1-1_amd64.deb 2>&1")
		if strings.Count(out, "\nconenatd: ") != 1 || !strings.Contains(out, "conenatd: systemd does not run here") {
			t.Errorf("after %q: the installation does not say in one sentence that systemd does not run:\n%s", before, out)
		}
		c.do("getent passwd conenatd && getent group nogroup")
		c.do("printf '%s\\n' 'on_stop = \"keep\"' '[[subnet]]' 'prefix = \"10.47.11.0/24\"' >/etc/conenatd/conenatd.toml")
		c.do("setsid conenatd run --config /etc/conenatd/conenatd.toml </dev/null >/tmp/log 2>&1 &")
		c.until("conenatd status")
		s.Contact(phone, proxy)
		out = c.do("dpkg --install /packages/conenatd_0.0.2-1_amd64.deb 2>&1")
		if !strings.Contains(out, "restart conenatd yourself") {
			t.Errorf("after %q: the upgrade does not say that the old program still runs:\n%s", before, out)
		}
		if out := c.do("dpkg --remove conenatd 2>&1"); strings.Contains(out, "conenatd: ") {
			t.Errorf("after %q: the removal complains:\n%s", before, out)
		}
		if out, err := c.try("cat /proc/[0-9]*/comm | grep -x conenatd"); err == nil {
			t.Errorf("after %q and the removal there runs %s", before, out)
		}
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("after %q: the removal left in the kernel: %q", before, left)
		}
		if now := ruleset(s); now != rules {
			t.Errorf("after %q: the removal left the rules\n%s", before, now)
		}
		out = c.do("dpkg --purge conenatd 2>&1")
		if left := c.traces(); left != traces {
			t.Errorf("after %q and the purge, which printed\n%s\n%s\nbefore the installation:\n%s", before, out, left, traces)
		}
		c.do("userdel conenatd; groupdel conenatd; true")
	}

	c.do("dpkg --install /packages/conenatd_0.0.1-1_amd64.deb 2>&1")
	c.do("setsid setpriv --reuid=conenatd --regid=conenatd --clear-groups sleep infinity </dev/null >/dev/null 2>&1 & echo $! >/tmp/pid")
	c.until("test $(stat -c %u /proc/$(cat /tmp/pid)) = $(id -u conenatd)")
	if out := c.do("dpkg --purge conenatd 2>&1"); !strings.Contains(out, "conenatd: the user or the group conenatd remains") {
		t.Errorf("a purge while a process of the user runs printed\n%s", out)
	}
}

// The RPM package is installed, started, upgraded and removed by rpm.
//
// Fails when the scripts do not understand the arguments that rpm calls them with.
func TestPackageByRPM(t *testing.T) {
	need(t)
	s := stage.New(t, lab.Options{})
	rules := ruleset(s)
	dir := t.TempDir()
	build(t, "../..", "v0.0.1", dir)
	build(t, "../..", "v0.0.2", dir)
	c := boot(t, s, dir)
	// Its database knows none of Debian's packages.
	const rpm = "rpm --force-debian --nodeps "
	c.do("rpm --query --package --requires /packages/conenatd-0.0.1-1.x86_64.rpm | grep -qx /usr/sbin/useradd && test -x /usr/sbin/useradd")
	if out := c.do(rpm + "--install /packages/conenatd-0.0.1-1.x86_64.rpm 2>&1"); !strings.Contains(out, nextStep) {
		t.Errorf("the first installation does not tell the next step:\n%s", out)
	}
	c.do("rpm --verify --nodeps conenatd")
	c.do("printf '%s\\n' 'on_stop = \"keep\"' '[[subnet]]' 'prefix = \"10.47.11.0/24\"' >/etc/conenatd/conenatd.toml")
	c.do("systemctl enable --now conenatd")
	before := c.do("systemctl show --property=MainPID conenatd")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	child := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, child, ext)

	c.do(rpm + "--upgrade /packages/conenatd-0.0.2-1.x86_64.rpm 2>&1")
	c.do("systemctl is-active conenatd")
	if after := c.do("systemctl show --property=MainPID conenatd"); after == before || c.do("conenatd version") != "conenatd v0.0.2" {
		t.Errorf("before the upgrade %s, then %s, with %s", before, after, c.do("conenatd version"))
	}
	s.Arrives(phone, child, ext)

	c.do(rpm + "--erase conenatd 2>&1")
	if state, err := c.try("systemctl is-active conenatd"); err == nil {
		t.Errorf("after the removal the service is %s", state)
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("the removal left in the kernel: %q", left)
	}
	if now := ruleset(s); now != rules {
		t.Errorf("the removal left the rules\n%s", now)
	}
	c.do("test ! -e /usr/bin/conenatd && test -f /etc/conenatd/conenatd.toml.rpmsave")
}

// nextStep is what a first installation prints.
const nextStep = `"conenatd status" says which it would serve, and the command that enables it`

// until repeats a command until it succeeds.
func (c *container) until(command string) {
	c.do("timeout 30 sh -c 'until " + strings.ReplaceAll(command, "'", `'\''`) + "; do sleep 0.1; done'")
}

// traces lists the files and users of the container that are named conenatd. systemd's own
// journal and dpkg's own log and backups remember everything, and systemd forgets a unit that it was
// asked for and did not find only when it has nothing else to do.
func (c *container) traces() string {
	return c.do("find / -xdev -iname '*conenat*' -not -path '/packages*' -not -path '/proc/*' -not -path '/sys/*'; find /run -iname '*conenat*'; " +
		"getent passwd conenatd; getent group conenatd; test ! -d /run/systemd/system || systemctl list-units --all --state=loaded,failed --plain --no-legend 'conenatd*'")
}

func ruleset(s *stage.Scene) string {
	s.T.Helper()
	text, err := s.Ruleset()
	s.Must(err)
	return text
}

// paced calls once at most 200 times a second, so that the ports of a peer last.
func paced(once func() error) func() error {
	tick := time.NewTicker(5 * time.Millisecond)
	return func() error {
		<-tick.C
		return once()
	}
}
