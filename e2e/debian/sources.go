package debian

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// source is one source of packages (sources.list(5)): fields by their name in
// lower case. Values of several lines keep their line ends.
type source map[string]string

// with returns the source in the deb822 style with some fields replaced.
func (s source) with(fields map[string]string) string {
	all := make(map[string]string)
	for k, v := range s {
		all[k] = v
	}
	for k, v := range fields {
		all[k] = v
	}
	var lines []string
	for k, v := range all {
		lines = append(lines, k+": "+v+"\n")
	}
	slices.Sort(lines)
	return strings.Join(lines, "")
}

// findSource finds Debian's own source of a suite. Other projects use the same
// suite names, but their addresses hardly contain "debian".
func findSource(all []source, suite string) source {
	for _, s := range all {
		if slices.Contains(strings.Fields(s["types"]), "deb") &&
			slices.Contains(strings.Fields(s["suites"]), suite) &&
			slices.Contains(strings.Fields(s["components"]), "main") &&
			s["enabled"] != "no" && strings.Contains(s["uris"], "debian") {
			return s
		}
	}
	return nil
}

// readSources reads all sources in apt's folder, in both styles.
func readSources(dir string) ([]source, error) {
	files := []string{filepath.Join(dir, "sources.list")}
	for _, pattern := range []string{"*.list", "*.sources"} {
		more, err := filepath.Glob(filepath.Join(dir, "sources.list.d", pattern))
		if err != nil {
			return nil, err
		}
		files = append(files, more...)
	}
	var all []source
	for _, f := range files {
		b, err := os.ReadFile(f)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if strings.HasSuffix(f, ".list") {
			all = append(all, parseList(string(b))...)
		} else {
			all = append(all, parseDeb822(string(b))...)
		}
	}
	return all, nil
}

// parseList parses lines like "deb [signed-by=KEYS] URI SUITE COMPONENT...".
func parseList(text string) (all []source) {
	for line := range strings.Lines(text) {
		line, _, _ = strings.Cut(line, "#")
		kind, rest, _ := strings.Cut(strings.TrimSpace(line), " ")
		s := source{"types": kind}
		if options, after, ok := strings.Cut(strings.TrimSpace(rest), "]"); ok {
			for _, o := range strings.Fields(strings.TrimPrefix(options, "[")) {
				name, value, _ := strings.Cut(o, "=")
				s[strings.ToLower(name)] = strings.ReplaceAll(value, ",", " ")
			}
			rest = after
		}
		f := strings.Fields(rest)
		if len(f) < 3 {
			continue
		}
		s["uris"], s["suites"], s["components"] = f[0], f[1], strings.Join(f[2:], " ")
		all = append(all, s)
	}
	return all
}

// parseDeb822 parses stanzas of "Field: value", separated by empty lines.
func parseDeb822(text string) (all []source) {
	s, field := source{}, ""
	for line := range strings.Lines(text + "\n\n") {
		line = strings.TrimRight(line, " \t\r\n")
		switch {
		case strings.HasPrefix(line, "#"):
		case line == "":
			if len(s) > 0 {
				all = append(all, s)
			}
			s, field = source{}, ""
		case line[0] == ' ' || line[0] == '\t':
			s[field] += "\n" + line
		default:
			name, value, _ := strings.Cut(line, ":")
			field = strings.ToLower(name)
			s[field] = strings.TrimSpace(value)
		}
	}
	return all
}

// writeSources writes one source for each suite: a copy of this machine's own, with
// its mirror, keys and options; only suite and architecture differ.
func writeSources(dir string, suites []string, arch string) error {
	release, err := osRelease()
	if err != nil {
		return err
	}
	own, err := readSources("/etc/apt")
	if err != nil {
		return err
	}
	for i, suite := range suites {
		// Security updates have a source of their own.
		template := release
		if strings.HasSuffix(suite, "-security") {
			template += "-security"
		}
		s := findSource(own, template)
		if s == nil {
			if i > 0 {
				continue // older point releases are enough
			}
			return fmt.Errorf("no source for %s in /etc/apt: want a Debian system", template)
		}
		text := s.with(map[string]string{
			"types": "deb", "suites": suite, "components": "main", "architectures": arch, "targets": "Packages",
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
