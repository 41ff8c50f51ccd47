package debian

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

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
