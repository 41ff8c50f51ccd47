package internal_test

import (
	"bytes"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// longest is the maximum of lines for a file that docs/adr/0008-long-files.md does not
// list.
const longest = 500

// Fails when an unlisted file is too long, and when a listed one is not, or is gone.
func TestFilesAreShort(t *testing.T) {
	record, err := os.ReadFile("../docs/adr/0008-long-files.md")
	if err != nil {
		t.Fatal(err)
	}
	named := make(map[string]bool)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(string(record), -1) {
		named[m[1]] = true
	}
	seen := 0
	err = filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if path == "../bin" {
			return fs.SkipDir
		}
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		seen++
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(filepath.ToSlash(path), "../")
		n := bytes.Count(text, []byte("\n"))
		if n > longest != named[name] {
			t.Errorf("%s has %d lines, and the record names it: %v", name, n, named[name])
		}
		delete(named, name)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if gone := slices.Sorted(maps.Keys(named)); len(gone) > 0 || seen < 100 {
		t.Errorf("of %d files none is %q", seen, gone)
	}
}
