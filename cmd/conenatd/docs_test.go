package main

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/docs"
)

// known are the languages of fenced blocks.
var known = []string{"sh", "console", "toml", "nft", "iptables-restore", "status", "yaml", "text"}

// parse checks the arguments of a command line by the program's own parser, without running
// it. A name in running text may stand without its arguments.
func parse(args []string, running bool) error {
	root := command(nil)
	root.InitDefaultCompletionCmd(args...)
	c, rest, err := root.Find(args)
	if err != nil {
		return err
	}
	if c == root && len(args) > 0 {
		return fmt.Errorf("no command: %q", args)
	}
	c.InitDefaultHelpFlag()
	if err := c.ParseFlags(rest); err != nil {
		return err
	}
	if err := c.ValidateArgs(c.Flags().Args()); err != nil && (!running || c.Flags().NArg() > 0) {
		return err
	}
	if c.Name() != "run" || c.Flags().Changed("config") || c.Flags().Changed("help") {
		return nil
	}
	// The values of the flags are those of a configuration, which "config" reads.
	root.SetArgs(append([]string{"config"}, rest...))
	root.SetOut(new(bytes.Buffer))
	return root.Execute()
}

// load checks a configuration by the program's own parser.
func load(t *testing.T, text string) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), "conenatd.toml")
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := config.Load(path)
	return err
}

// assigned returns configurations with a line such as "hairpin = true", if its key exists: one
// of them has what else the key needs.
func assigned(span string) (files []string) {
	key, _, found := strings.Cut(span, " = ")
	is := func(k config.Key) bool { return found && k.Name == key }
	const subnet, mapped = "[[subnet]]\nprefix = \"10.47.11.0/24\"\n", "mapping = \"endpoint_independent\"\n"
	if slices.ContainsFunc(config.Sections(), func(s config.Section) bool { return slices.ContainsFunc(s.Keys, is) }) {
		files = append(files, span, "outside = [\"wan0\", \"wan1\"]\n"+span+"\n"+subnet+mapped)
	}
	if slices.ContainsFunc(config.SubnetKeys(), is) {
		files = append(files, "[[subnet]]\n"+span, subnet+span)
	}
	return files
}

// assignment matches inline code that sets a key, and ofOthers are the keys of firewalld and of the
// kernel in the pages.
var (
	assignment = regexp.MustCompile(`^([a-z_]+) = `)
	ofOthers   = []string{"firewall_backend", "nf_conntrack_events", "fib_multipath_hash_fields"}
)

// What the pages tell people to type, the program understands: its commands, flags and
// configurations, in fenced blocks and in running text.
//
// Fails when a page has a command, a flag, a key or a value that does not exist, and when a
// fenced block does not say its language, so that no test would read it.
func TestPagesSayWhatTheProgramUnderstands(t *testing.T) {
	pages, err := docs.Pages("../..")
	if err != nil {
		t.Fatal(err)
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	commands, files, keys := 0, 0, 0
	for _, path := range pages {
		page, err := docs.Read(path)
		if err != nil {
			t.Fatal(err)
		}
		understood := func(line int, text string, running bool) {
			t.Helper()
			for _, args := range docs.Program(text, "conenatd") {
				commands++
				if err := parse(args, running); err != nil {
					t.Errorf("%s:%d: %s: %v", path, line, text, err)
				}
			}
		}
		for _, b := range page.Blocks {
			switch {
			case !slices.Contains(known, b.Lang):
				t.Errorf("%s:%d: a block of %q: no test knows this language", path, b.Line, b.Lang)
			case b.Lang == "toml":
				files++
				if err := load(t, b.Text); err != nil {
					t.Errorf("%s:%d: %v", path, b.Line, err)
				}
			}
			for _, c := range b.Commands() {
				understood(c.Line, c.Text, false)
				for _, args := range docs.Program(c.Text, "make") {
					if !regexp.MustCompile(`(?m)^` + args[0] + `:`).Match(makefile) {
						t.Errorf("%s:%d: %s: the Makefile has no such target", path, c.Line, c.Text)
					}
				}
			}
		}
		for _, s := range page.Spans {
			understood(s.Line, s.Text, true)
			var errs []error
			for _, text := range assigned(s.Text) {
				errs = append(errs, load(t, text))
			}
			switch m := assignment.FindStringSubmatch(s.Text); {
			case len(errs) == 0 && m != nil && !slices.Contains(ofOthers, m[1]):
				t.Errorf("%s:%d: %s: no such key", path, s.Line, s.Text)
			case len(errs) == 0:
			case !slices.Contains(errs, nil):
				t.Errorf("%s:%d: %s: %v", path, s.Line, s.Text, errs)
			default:
				keys++
			}
		}
	}
	if commands < 100 || files < 30 || keys < 50 {
		t.Errorf("the pages have %d commands, %d configurations and %d values", commands, files, keys)
	}
}
