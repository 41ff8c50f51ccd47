package internal_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Fails when docs/results/promises.md names a test that does not exist, or that is in another
// package than it says, and when a promise has neither a test nor a figure.
func TestPromisesNameTheirTests(t *testing.T) {
	text, err := os.ReadFile("../docs/results/promises.md")
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]string{} // the folders of each test
	definition := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		source, err := os.ReadFile(path)
		for _, m := range definition.FindAllStringSubmatch(string(source), -1) {
			found[m[1]] += filepath.ToSlash(filepath.Dir(path)) + " "
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	names, rows := regexp.MustCompile("`(Test\\w+)`(?: \\(([\\w/]+)\\))?"), 0
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(line, "|")
		if len(cells) != 4 || strings.HasPrefix(cells[1], "---") || strings.HasPrefix(cells[1], " sentence") {
			continue
		}
		rows++
		all := names.FindAllStringSubmatch(cells[2], -1)
		if len(all) == 0 && !strings.Contains(cells[2], "](") {
			t.Errorf("no test and no figure:%s", cells[1])
		}
		for _, m := range all {
			name, folder := m[1], m[2]
			if folder == "guest" {
				folder = ""
			}
			if found[name] == "" || !strings.Contains(found[name], folder+" ") {
				t.Errorf("%s is not in %q:%s", name, folder, cells[1])
			}
		}
	}
	if rows < 60 {
		t.Errorf("found %d promises only", rows)
	}
}
