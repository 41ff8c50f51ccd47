package kernels

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// suites are the parts of Debian's archive that each kernel comes from; of a
// kernel with security updates the newest is taken.
var suites = map[string][]string{
	"5.10": {"bullseye", "bullseye-security"},
	"6.1":  {"bookworm", "bookworm-security"},
	"6.12": {"trixie", "trixie-security"},
	"7.3":  {"trixie-backports"},
}

// known lists the kernels for messages.
func known() string { return strings.Join(slices.Sorted(maps.Keys(suites)), " ") }

const (
	fetchTime = 5 * time.Minute
	// freshTime is how long an unpacked kernel is used without asking the
	// archive for a newer one.
	freshTime = 24 * time.Hour
)

// fetch returns the folder with Debian's kernel of that version, unpacked. It
// uses the cache when that has what the archive has, or when the archive cannot
// be reached; the error is an archiveError where that would be needed. Processes
// that share a cache take turns.
func fetch(t *testing.T, version string) (tree, error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", err
	}
	cache = filepath.Join(cache, "conenatd", "kernels", version)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return "", err
	}
	defer unlock()

	old, age := newest(cache)
	if old != "" && age < freshTime {
		return old, nil
	}
	ctx, cancel := context.WithTimeout(t.Context(), fetchTime)
	defer cancel()
	k, err := renew(ctx, cache, version)
	if err != nil && old != "" {
		t.Logf("using the cached kernel: %v", err)
		return old, nil
	}
	return k, err
}

// archiveError says that Debian's archive did not give what was asked of it.
type archiveError struct{ error }

func (e archiveError) Error() string { return "download the kernel: " + e.error.Error() }

func lock(path string) (unlock func() error, err error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f.Close, nil
}

// treePrefix begins the names of trees with all files that are wanted now.
func treePrefix() string { return fmt.Sprintf("tree-%.3x-", sha256.Sum256([]byte(wanted.String()))) }

// newest finds the tree in the cache that was renewed last.
func newest(cache string) (k tree, age time.Duration) {
	stamps, _ := filepath.Glob(filepath.Join(cache, treePrefix()+"*", "packages"))
	for _, s := range stamps {
		if st, err := os.Stat(s); err == nil && (k == "" || time.Since(st.ModTime()) < age) {
			k, age = tree(filepath.Dir(s)), time.Since(st.ModTime())
		}
	}
	return k, age
}

// renew asks the archive for its newest packages and unpacks them unless that
// was done before.
func renew(ctx context.Context, cache, version string) (tree, error) {
	a, err := newApt(cache, suites[version])
	if err != nil {
		return "", err
	}
	if _, err := a.run(ctx, "apt-get", "update"); err != nil {
		return "", err
	}
	names, err := a.packages(ctx, "linux-image-amd64")
	if err != nil {
		return "", err
	}
	// Lines with address, file, size and checksum.
	list, err := a.run(ctx, "apt-get", append([]string{"download", "--print-uris"}, names...)...)
	if err != nil {
		return "", err
	}
	k := tree(filepath.Join(cache, fmt.Sprintf("%s%.6x", treePrefix(), sha256.Sum256([]byte(list)))))
	if _, err := os.Stat(k.path("packages")); err == nil {
		now := time.Now()
		return k, os.Chtimes(k.path("packages"), now, now)
	}
	debs, err := os.MkdirTemp(cache, "debs-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(debs)
	a.dir = debs
	// apt checks the checksums, which are signed.
	if _, err := a.run(ctx, "apt-get", append([]string{"download"}, names...)...); err != nil {
		return "", err
	}
	fresh := tree(filepath.Join(debs, "tree"))
	if err := fresh.unpack(ctx, debs); err != nil {
		return "", err
	}
	if err := os.WriteFile(fresh.path("packages"), []byte(list), 0o644); err != nil {
		return "", err
	}
	// A run that goes on with an older tree is over in a day.
	if old, age := newest(cache); old != "" && age > freshTime {
		os.RemoveAll(string(old))
	}
	return k, os.Rename(string(fresh), string(k))
}

// apt runs Debian's tools with lists and caches of its own: nothing that this
// machine has is changed or installed. Proxies and the like are the machine's.
type apt struct {
	dir     string // where downloads go
	options []string
}

func newApt(cache string, suites []string) (*apt, error) {
	dir := filepath.Join(cache, "apt")
	for _, d := range []string{"lists/partial", "archives/partial", "sources"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := writeSources(filepath.Join(dir, "sources"), suites); err != nil {
		return nil, err
	}
	a := &apt{dir: dir}
	for _, o := range []string{
		"Dir::Etc::SourceList=/dev/null",
		"Dir::Etc::SourceParts=" + dir + "/sources",
		"Dir::Etc::Preferences=/dev/null",
		"Dir::Etc::PreferencesParts=/dev/null",
		"Dir::State=" + dir,
		"Dir::State::status=/dev/null",
		"Dir::Cache=" + dir,
		"APT::Sandbox::User=root", // who else could write below /root
		"Acquire::Languages=none",
		"Acquire::Retries=2",
		"Acquire::http::Timeout=30",
		"APT::Update::Error-Mode=any",      // else an archive out of reach is no error
		"Acquire::Check-Valid-Until=false", // old suites are no longer signed anew
	} {
		a.options = append(a.options, "-o", o)
	}
	return a, nil
}

func (a *apt) run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), append([]string{"-q"}, args...)...)...)
	cmd.Dir = a.dir
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("run %s %s: %w", name, args[0], err)
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, firstError(exit.Stderr))
		}
		return "", archiveError{err}
	}
	return string(out), nil
}

// firstError finds the first line that matters in what a program complained
// about: apt marks errors, among warnings.
func firstError(stderr []byte) string {
	text := strings.TrimSpace(string(stderr))
	if i := strings.Index(text, "E: "); i >= 0 {
		text = text[i:]
	}
	line, _, _ := strings.Cut(text, "\n")
	return line
}

var (
	dependsLine = regexp.MustCompile(`(?m)^ *Depends: (linux-(?:image|binary|modules)-[0-9]\S*)$`)
	// From 7.1 on the image package is empty and needs two others.
	imagePackage = regexp.MustCompile(`^linux-image-`)
)

// packages finds the packages with the kernel that the meta package stands for.
func (a *apt) packages(ctx context.Context, meta string) ([]string, error) {
	out, err := a.run(ctx, "apt-cache", "depends", meta)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range dependsLine.FindAllStringSubmatch(out, -1) {
		names = append(names, m[1])
		if imagePackage.MatchString(m[1]) {
			more, err := a.packages(ctx, m[1])
			if err != nil {
				return nil, err
			}
			names = append(names, more...)
		}
	}
	if len(names) == 0 && !imagePackage.MatchString(meta) {
		return nil, fmt.Errorf("package %s depends on no kernel", meta)
	}
	return names, nil
}

// writeSources writes a source for each suite: this machine's own, with its
// mirror, keys and options, with nothing changed but the suite.
func writeSources(dir string, suites []string) error {
	release, err := osRelease()
	if err != nil {
		return err
	}
	own, err := readSources("/etc/apt")
	if err != nil {
		return err
	}
	for i, suite := range suites {
		// Security updates come from another place than the rest.
		template := release
		if strings.HasSuffix(suite, "-security") {
			template += "-security"
		}
		s := findSource(own, template)
		if s == nil {
			if i > 0 {
				continue // older point releases will do
			}
			return fmt.Errorf("no source for %s in /etc/apt: want a Debian system", template)
		}
		text := s.with(map[string]string{
			"types": "deb", "suites": suite, "components": "main", "architectures": "amd64", "targets": "Packages",
		})
		if err := os.WriteFile(filepath.Join(dir, suite+".sources"), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// osRelease is the code name of the Debian release that runs here.
func osRelease() (string, error) {
	b, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "VERSION_CODENAME="); ok {
			return strings.Trim(name, `"`), nil
		}
	}
	return "", errors.New("/etc/os-release has no VERSION_CODENAME: want a Debian system")
}
