package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/docs"
)

// recipes is where the pages are.
const recipes = "../docs/recipes"

// The sections of a page that the tests know, in this order.
const (
	pageGateway = "The gateway"          // links, routes and rules
	pageConfig  = "conenatd.toml"        // the configuration
	pageLine    = "The line to add"      // without it answers are lost
	pageStatus  = "What status shows"    // with the line to add
	pageOneLink = "A host by one uplink" // a variation
	pageMapLine = "A line for the map"   // lets the map carry permissions
	pageMore    = "What to look out for" // text for people only
)

// loaded are the languages of the blocks that tests use; text is for people.
var loaded = []string{"nft", "iptables-restore", "sh", "toml", "status", "text"}

// readPage reads a recipe.
func readPage(t *testing.T, name string) docs.Page {
	t.Helper()
	p, err := docs.Read(filepath.Join(recipes, name+".md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, section := range p.Sections {
		if !slices.Contains([]string{pageGateway, pageConfig, pageLine, pageStatus, pageOneLink, pageMapLine, pageMore}, section) {
			t.Fatalf("%s: no test knows a section %q", name, section)
		}
	}
	for _, b := range p.Blocks {
		if !slices.Contains(loaded, b.Lang) {
			t.Fatalf("%s: no test loads a block of %q in %q: have it as text if it is for people alone", name, b.Lang, b.Section)
		}
	}
	for _, section := range []string{pageGateway, pageConfig, pageStatus} {
		if !slices.ContainsFunc(p.In(section), func(b docs.Block) bool { return b.Lang != "text" }) {
			t.Fatalf("%s: nothing in the section %q", name, section)
		}
	}
	return p
}

// config writes the page's configuration to a file, and returns the path.
func (r *recipe) config() string {
	r.T.Helper()
	blocks := r.In(pageConfig)
	if len(blocks) != 1 || blocks[0].Lang != "toml" {
		r.T.Fatalf("%s: want one toml block in %q, got %v", r.Path, pageConfig, blocks)
	}
	path := filepath.Join(r.T.TempDir(), "conenatd.toml")
	r.Must(os.WriteFile(path, []byte(blocks[0].Text), 0o644))
	return path
}

// load runs the rules and commands of a section in the gateway, unchanged.
func (r *recipe) load(section string) {
	r.T.Helper()
	for _, b := range r.In(section, "nft", "iptables-restore", "sh") {
		switch b.Lang {
		case "nft":
			r.Must(r.NFT(b.Text))
		case "iptables-restore":
			r.Must(r.IPTables(r.variant, b.Text))
		case "sh":
			r.shell(b.Text)
		}
	}
}

// shell runs commands in the gateway; "iptables" there is the play's variant.
func (r *recipe) shell(commands string) {
	r.T.Helper()
	r.runShell("iptables", r.variant, commands)
}

// runShell runs commands in the gateway as root's shell would; the command name stands for
// program.
func (s *scene) runShell(name, program, commands string) {
	s.T.Helper()
	ctx, cancel := context.WithTimeout(s.T.Context(), stage.Patience())
	defer cancel()
	script := fmt.Sprintf("PATH=$PATH:/usr/sbin:/sbin\n%s() { %s \"$@\"; }\n%s", name, program, commands)
	if out, err := s.Gateway.Command(ctx, "sh", "-e", "-c", script).CombinedOutput(); err != nil {
		s.T.Fatalf("%v: %s\n%s", err, out, commands)
	}
}

// shows waits until status has the lines of a section and no other warnings. "..."
// stands for any text.
func (r *recipe) shows(section string) {
	r.T.Helper()
	var told []*regexp.Regexp
	for _, b := range r.In(section, "status") {
		for line := range strings.Lines(b.Text) {
			want := regexp.MustCompile("(?m)^" + strings.ReplaceAll(regexp.QuoteMeta(unspaced(line)), `\.\.\.`, ".*") + "$")
			end, out := time.Now().Add(stage.Patience()), ""
			for out = r.status(); !want.MatchString(out); out = r.status() {
				if time.Now().After(end) {
					r.T.Fatalf("%q is not in status:\n%s", line, out)
				}
			}
			told = append(told, want)
		}
	}
	for _, w := range r.Status().Warnings {
		if !slices.ContainsFunc(told, func(line *regexp.Regexp) bool { return line.MatchString(w) }) {
			r.T.Errorf("%q does not tell of the warning %q", section, w)
		}
	}
}

// status is what "conenatd status" prints.
func (r *recipe) status() string {
	r.T.Helper()
	out, code := r.CLI("status", "--control-socket", r.Daemon.Socket)
	if code != 0 {
		r.T.Fatalf("status: exit %d, %s", code, out)
	}
	return unspaced(out)
}

var spaces = regexp.MustCompile(`(?m)[ \t]+|^[ \t]+|[ \t]+$`)

// unspaced removes the column alignment, so that lines can be compared.
func unspaced(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, l := range lines {
		lines[i] = strings.TrimSpace(spaces.ReplaceAllString(l, " "))
	}
	return strings.Join(lines, "\n")
}

// Every page has a test, and is in the list of pages.
//
// Fails when a page has no test or no list entry, and when a page that they name is gone.
func TestRecipesAreAllListedAndPlayed(t *testing.T) {
	files, err := filepath.Glob(filepath.Join(recipes, "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := os.ReadFile(filepath.Join(recipes, "README.md"))
	if err != nil {
		t.Fatal(err)
	}
	var pages, listed []string
	played := []string{"container", "uplink-marks"} // by TestContainer and TestChildrenAnswerByTheirUplink
	for _, f := range files {
		if name := strings.TrimSuffix(filepath.Base(f), ".md"); name != "README" {
			pages = append(pages, name)
		}
	}
	for _, m := range regexp.MustCompile(`\]\(([\w-]+)\.md\)`).FindAllStringSubmatch(string(list), -1) {
		listed = append(listed, m[1])
	}
	for _, r := range plays {
		played = append(played, r.page)
	}
	slices.Sort(pages)
	slices.Sort(listed)
	slices.Sort(played)
	if played = slices.Compact(played); !slices.Equal(listed, pages) || !slices.Equal(played, pages) || len(pages) == 0 {
		t.Errorf("there are pages %q, the list has %q, and the tests play %q", pages, listed, played)
	}
}

// What a recipe lets through the forward chain is UDP into its subnets, as in the lines of
// doctor: not everything that the user's other forwards lead in.
//
// Fails when a line that accepts DNATed packets has neither a protocol nor a destination.
func TestRecipesOpenForUDPIntoTheSubnetAlone(t *testing.T) {
	pages, err := filepath.Glob(filepath.Join(recipes, "*.md"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("%d pages: %v", len(pages), err)
	}
	lines := 0
	for _, page := range pages {
		text, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		block, fenced := "", false
		for line := range strings.Lines(string(text)) {
			if mark, is := strings.CutPrefix(line, "```"); is {
				block, fenced = strings.TrimSpace(mark), !fenced
				continue
			}
			accepts := strings.Contains(line, "ct status dnat") && strings.Contains(line, "accept") ||
				strings.Contains(line, "--ctstate DNAT") && strings.Contains(line, "ACCEPT")
			if !fenced || block == "status" || !accepts {
				continue
			}
			lines++
			into := strings.Contains(line, "daddr ") || strings.Contains(line, " -d ") || strings.Contains(line, "loc:10.")
			if !strings.Contains(line, "udp") || !into {
				t.Errorf("%s: %s", filepath.Base(page), line)
			}
		}
	}
	if lines == 0 {
		t.Error("no page has such a line")
	}
}
