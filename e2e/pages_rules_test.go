package e2e

import (
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/docs"
	"github.com/conenatd/conenatd/internal/lab"
)

// ruleLine matches a command that adds a rule or a table.
var ruleLine = regexp.MustCompile(`^(nft '|nft (add|insert) |ip6?tables(-nft|-legacy)? (-t \w+ )?-[AI] )`)

// Rules on pages that no test plays are rules that the kernel takes.
//
// Fails when a ruleset or a line that adds a rule is wrong.
func TestRulesOfPagesLoad(t *testing.T) {
	pages, err := docs.Pages("..")
	if err != nil {
		t.Fatal(err)
	}
	s := newScene(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	s.Must(s.IPTables(lab.IPTablesNFT, "*filter\n:DOCKER-USER - [0:0]\nCOMMIT\n")) // as Docker makes it
	lines := 0
	add := func(path string, line int, command string) {
		t.Helper()
		if !ruleLine.MatchString(command) {
			return
		}
		lines++
		if out, err := s.Gateway.Command(t.Context(), "sh", "-c", "PATH=$PATH:/usr/sbin:/sbin\n"+command).CombinedOutput(); err != nil {
			t.Errorf("%s:%d: %s: %v: %s", path, line, command, err, out)
		}
	}
	for _, path := range pages {
		page, err := docs.Read(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, span := range page.Spans {
			add(path, span.Line, span.Text)
		}
		if filepath.Base(filepath.Dir(path)) == "recipes" || filepath.Base(path) == "troubleshooting.md" {
			continue // their blocks are played
		}
		for _, b := range page.Blocks {
			var err error
			switch b.Lang {
			case "nft":
				err = s.NFT(b.Text)
			case "iptables-restore":
				err = s.IPTables(lab.IPTablesNFT, b.Text)
			}
			if err != nil {
				t.Errorf("%s:%d: %v", path, b.Line, err)
			}
			for _, c := range b.Commands() {
				add(path, c.Line, strings.TrimPrefix(c.Text, "sudo "))
				for _, shown := range c.Output {
					add(path, c.Line, strings.TrimSpace(shown))
				}
			}
		}
	}
	if lines == 0 {
		t.Error("no page has such a line")
	}
}
