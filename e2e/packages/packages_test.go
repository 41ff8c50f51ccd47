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

// A package is installed, configured, upgraded below traffic, removed and purged.
//
// Fails when postinst restarts without SIGUSR1, when prerm or postrm does nothing, when the
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

	if out := c.do("dpkg --install /packages/conenatd_0.0.1-1_amd64.deb 2>&1"); !strings.Contains(out, "systemctl enable --now conenatd") {
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

	c.do("printf '%s\\n' 'max_children = 0' 'audit_log = \"/var/log/conenatd/audit.log\"' '[[subnet]]' 'prefix = \"10.47.11.0/24\"' >/etc/conenatd/conenatd.toml")
	c.do("systemctl enable --now conenatd")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	child := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, child, ext)
	c.until("grep -q child_begin /var/log/conenatd/audit.log")
	c.until("journalctl --unit conenatd --priority 6..6 --output cat | grep -q '^msg=.conenatd runs. '")
	before := c.do("systemctl show --property=MainPID conenatd")

	stop := s.Steady(paced(s.FreshPorts(phone, lab.PeerA, ext)))
	out := c.do("dpkg --install /packages/conenatd_0.0.2-1_amd64.deb 2>&1")
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

// until repeats a command until it succeeds.
func (c *container) until(command string) {
	c.do("timeout 30 sh -c 'until " + strings.ReplaceAll(command, "'", `'\''`) + "; do sleep 0.1; done'")
}

// traces lists the files and users of the container that are named conenatd. systemd's own
// journal and dpkg's own log and backups remember everything.
func (c *container) traces() string {
	return c.do("find / -xdev -iname '*conenat*' -not -path '/packages*' -not -path '/proc/*' -not -path '/sys/*'; find /run -iname '*conenat*'; " +
		"getent passwd conenatd; getent group conenatd; systemctl list-units --all --plain --no-legend 'conenatd*'; true")
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
