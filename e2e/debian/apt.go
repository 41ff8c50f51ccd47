package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// An ArchiveError says that Debian's archive could not be read.
type ArchiveError struct{ Err error }

func (e ArchiveError) Error() string { return "download from Debian's archive: " + e.Err.Error() }

// Unwrap returns the error of the program that asked.
func (e ArchiveError) Unwrap() error { return e.Err }

// Apt runs Debian's tools with its own lists and caches: it changes and installs
// nothing on this machine. Proxies and similar settings are the machine's.
type Apt struct {
	dir     string // for downloads
	options []string
}

func newApt(cache string, suites []string, arch string) (*Apt, error) {
	dir := filepath.Join(cache, "apt")
	if err := os.RemoveAll(filepath.Join(dir, "sources")); err != nil { // other suites, formerly
		return nil, err
	}
	for _, d := range []string{"lists/partial", "archives/partial", "sources"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o755); err != nil {
			return nil, err
		}
	}
	if err := writeSources(filepath.Join(dir, "sources"), suites, arch); err != nil {
		return nil, err
	}
	a := &Apt{dir: dir}
	for _, o := range []string{
		"Dir::Etc::SourceList=/dev/null",
		"Dir::Etc::SourceParts=" + dir + "/sources",
		"Dir::Etc::Preferences=/dev/null",
		"Dir::Etc::PreferencesParts=/dev/null",
		"Dir::State=" + dir,
		"Dir::State::status=/dev/null",
		"Dir::Cache=" + dir,
		"APT::Architecture=" + arch,
		"APT::Architectures=" + arch,
		"APT::Sandbox::User=root", // no other user could write below /root
		"Acquire::Languages=none",
		"Acquire::Retries=2",
		"Acquire::http::Timeout=30",
		"APT::Update::Error-Mode=any",      // otherwise an unreachable archive is no error
		"Acquire::Check-Valid-Until=false", // the lists of old suites are not renewed
	} {
		a.options = append(a.options, "-o", o)
	}
	return a, nil
}

// Run runs one of apt's programs and returns its standard output.
func (a *Apt) Run(ctx context.Context, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, append(slices.Clone(a.options), append([]string{"-q"}, args...)...)...)
	cmd.Dir = a.dir
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("run %s %s: %w", name, args[0], err)
		if exit, ok := errors.AsType[*exec.ExitError](err); ok {
			err = fmt.Errorf("%w: %s", err, firstError(exit.Stderr))
		}
		return "", ArchiveError{err}
	}
	return string(out), nil
}

// firstError finds the first error in a program's standard error; apt marks errors,
// which stand among warnings.
func firstError(stderr []byte) string {
	text := strings.TrimSpace(string(stderr))
	if i := strings.Index(text, "E: "); i >= 0 {
		text = text[i:]
	}
	line, _, _ := strings.Cut(text, "\n")
	return line
}

// Needed returns the names of the packages and of all that they depend on.
func (a *Apt) Needed(ctx context.Context, packages ...string) (names []string, err error) {
	out, err := a.Run(ctx, "apt-get", append([]string{"--simulate", "--no-install-recommends", "install"}, packages...)...)
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(out) {
		if rest, ok := strings.CutPrefix(line, "Inst "); ok {
			name, _, _ := strings.Cut(rest, " ")
			names = append(names, name)
		}
	}
	return names, nil
}
