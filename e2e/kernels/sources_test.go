package kernels

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
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

// findSource finds Debian's own source of a suite. Other projects name theirs
// by the same suites, but hardly one has Debian in its address.
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

// parseDeb822 parses stanzas of "Field: value", parted by empty lines.
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

func TestDebiansOwnSourceIsFoundInBothStyles(t *testing.T) {
	for name, file := range map[string]struct{ path, text string }{
		"one line": {"sources.list", `# comment
deb-src http://mirror.example/debian bookworm main
deb http://other.example/apt bookworm main
deb [arch=amd64,arm64 signed-by=/keys.gpg] http://mirror.example/debian bookworm main contrib # comment
`},
		"deb822": {"sources.list.d/debian.sources", `Types: deb
URIs: http://other.example/apt
Suites: bookworm
Components: main

# comment
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /keys.gpg
`},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, file.path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(file.text), 0o644)); err != nil {
				t.Fatal(err)
			}
			all, err := readSources(dir)
			if err != nil {
				t.Fatal(err)
			}
			got := findSource(all, "bookworm").with(map[string]string{
				"types": "deb", "suites": "trixie", "components": "main", "arch": "amd64",
			})
			want := "arch: amd64\ncomponents: main\nsigned-by: /keys.gpg\nsuites: trixie\ntypes: deb\nuris: http://mirror.example/debian\n"
			if got != want {
				t.Errorf("got\n%s\nwant\n%s", got, want)
			}
			if s := findSource(all, "sid"); s != nil {
				t.Errorf("found a source for sid: %q", s)
			}
		})
	}
}
