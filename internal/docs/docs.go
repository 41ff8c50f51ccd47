// Package docs reads the project's Markdown pages, so that tests can run what they show.
package docs

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// A Page is a Markdown page.
type Page struct {
	Path     string
	Sections []string // the headings of level 2
	Blocks   []Block
	Spans    []Span
}

// A Block is a fenced block, or a ruleset that the page links to.
type Block struct {
	Section string // the heading of level 2 above it; empty before the first one
	Lang    string // of the fence, or by the suffix of the linked file: nft or iptables-restore
	Text    string
	Line    int // number of the line in the page, from 1
}

// A Span is inline code; white space within it is a single blank.
type Span struct {
	Text string
	Line int
}

// A Command is a line for a shell, and what a page shows of its output.
type Command struct {
	Text   string
	Output []string
	Line   int
}

var (
	outline = regexp.MustCompile("(?ms)^## ([^\n]+)$|^```([^\n]*)\n(.*?)^```$|\\]\\(([^)\\s]+\\.(?:nft|iptables))\\)|`([^`]+)`")
	// linked are the languages of linked rulesets.
	linked = map[string]string{".nft": "nft", ".iptables": "iptables-restore"}
)

// Pages returns the paths of the pages for users and contributors in root, and of all in docs
// below it, sorted.
func Pages(root string) ([]string, error) {
	var all []string
	for _, name := range []string{"README.md", "SECURITY.md", "CONTRIBUTING.md"} {
		all = append(all, filepath.Join(root, name))
	}
	err := filepath.WalkDir(filepath.Join(root, "docs"), func(path string, _ fs.DirEntry, err error) error {
		if err == nil && filepath.Ext(path) == ".md" {
			all = append(all, path)
		}
		return err
	})
	slices.Sort(all)
	return all, err
}

// Read reads a page, and the rulesets that it links to.
func Read(path string) (Page, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return Page{}, err
	}
	p, section := Page{Path: path}, ""
	group := func(m []int, n int) string {
		if m[2*n] < 0 {
			return ""
		}
		return string(text[m[2*n]:m[2*n+1]])
	}
	for _, m := range outline.FindAllSubmatchIndex(text, -1) {
		line := 1 + strings.Count(string(text[:m[0]]), "\n")
		heading, lang, body, link, span := group(m, 1), group(m, 2), group(m, 3), group(m, 4), group(m, 5)
		switch {
		case heading != "":
			section = heading
			p.Sections = append(p.Sections, heading)
		case link != "":
			rules, err := os.ReadFile(filepath.Join(filepath.Dir(path), link))
			if err != nil {
				return p, fmt.Errorf("%s:%d: %w", path, line, err)
			}
			p.Blocks = append(p.Blocks, Block{section, linked[filepath.Ext(link)], string(rules), line})
		case span != "":
			p.Spans = append(p.Spans, Span{strings.Join(strings.Fields(span), " "), line})
		default:
			p.Blocks = append(p.Blocks, Block{section, lang, body, line})
		}
	}
	return p, nil
}

// In returns the blocks of a section, of the given languages or of all.
func (p Page) In(section string, langs ...string) (out []Block) {
	for _, b := range p.Blocks {
		if b.Section == section && (len(langs) == 0 || slices.Contains(langs, b.Lang)) {
			out = append(out, b)
		}
	}
	return out
}

// Program returns the arguments of each call of a program in a command, of any path, without sudo.
// Quotes and what a shell expands have no meaning here.
func Program(command, name string) (calls [][]string) {
	for _, part := range regexp.MustCompile(`&&|\|\||[;|>]| #`).Split(command, -1) {
		words := strings.Fields(part)
		for len(words) > 0 && (words[0] == "sudo" || strings.Contains(words[0], "=")) {
			words = words[1:]
		}
		if len(words) > 0 && filepath.Base(words[0]) == name {
			calls = append(calls, words[1:])
		}
	}
	return calls
}

// Commands returns the commands of a block: each line of sh, except for comments, and each line
// of console that begins with "$ ", with the lines of output below it. A backslash at
// the end of a line joins it with the next one.
func (b Block) Commands() (all []Command) {
	joined := strings.ReplaceAll(b.Text, "\\\n", " ")
	for i, line := range strings.Split(strings.TrimSuffix(joined, "\n"), "\n") {
		command, prompt := strings.CutPrefix(line, "$ ")
		switch {
		case b.Lang == "console" && !prompt:
			if len(all) > 0 {
				last := &all[len(all)-1]
				last.Output = append(last.Output, line)
			}
		case b.Lang == "sh" && (strings.TrimSpace(line) == "" || strings.HasPrefix(strings.TrimSpace(line), "#")):
		case b.Lang == "console" || b.Lang == "sh":
			all = append(all, Command{Text: command, Line: b.Line + 1 + i})
		}
	}
	return all
}
