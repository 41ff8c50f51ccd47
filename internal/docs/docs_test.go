package docs

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// Fails when a block, a span, a command or its output is overlooked.
func TestPageIsRead(t *testing.T) {
	dir := t.TempDir()
	text := "# Title\nSee `conenatd\nrun` and [rules](rules.nft).\n\n## First\n\n" +
		"```console\n$ sudo conenatd list\nINT\n$ true\n```\n\n```sh\n# comment\nmake \\\n  all\n```\n```\nplain\n```\n"
	for name, content := range map[string]string{"page.md": text, "rules.nft": "table ip t { }\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	p, err := Read(filepath.Join(dir, "page.md"))
	if err != nil {
		t.Fatal(err)
	}
	want := Page{
		Path: p.Path, Sections: []string{"First"}, Spans: []Span{{"conenatd run", 2}},
		Blocks: []Block{
			{"", "nft", "table ip t { }\n", 3},
			{"First", "console", "$ sudo conenatd list\nINT\n$ true\n", 7},
			{"First", "sh", "# comment\nmake \\\n  all\n", 13},
			{"First", "", "plain\n", 18},
		},
	}
	if d := cmp.Diff(want, p); d != "" {
		t.Error(d)
	}
	var all []Command
	for _, b := range p.In("First", "console", "sh") {
		all = append(all, b.Commands()...)
	}
	commands := []Command{{"sudo conenatd list", []string{"INT"}, 8}, {"true", nil, 10}, {"make    all", nil, 15}}
	if d := cmp.Diff(commands, all); d != "" {
		t.Error(d)
	}
	calls := Program("A=1 sudo bin/conenatd run --json > file; conenatd list | grep conenatd && conenatd-other x", "conenatd")
	if d := cmp.Diff([][]string{{"run", "--json"}, {"list"}}, calls); d != "" {
		t.Error(d)
	}
}

// Fails when a page is not found, or a rule file that it links to is gone.
func TestPagesAreRead(t *testing.T) {
	pages, err := Pages("../..")
	if err != nil || len(pages) < 40 {
		t.Fatalf("%d pages: %v", len(pages), err)
	}
	for _, path := range pages {
		if _, err := Read(path); err != nil {
			t.Error(err)
		}
	}
}
