package internal_test

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// sources returns the text of each Go file, by its path from the root of the project.
func sources(t *testing.T) map[string]string {
	t.Helper()
	all := make(map[string]string)
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") {
			return err
		}
		text, err := os.ReadFile(path)
		all[filepath.ToSlash(strings.TrimPrefix(path, "../"))] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

func read(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Fails when a search of docs/architecture.md finds nothing, or several places where it
// promises one.
func TestQuestionsAreAnsweredByOneSearch(t *testing.T) {
	_, table, _ := strings.Cut(read(t, "../docs/architecture.md"), "\n## Where is it?\n")
	table, _, _ = strings.Cut(table, "\n## ")
	code := sources(t)
	searches := 0
	for _, row := range strings.Split(table, "\n") {
		for _, m := range regexp.MustCompile(`'([^']+)' (internal/[a-z/]+)`).FindAllStringSubmatch(row, -1) {
			searches++
			// In a basic regular expression, parentheses without a backslash are letters.
			pattern, err := regexp.Compile("(?m)" + strings.NewReplacer("(", `\(`, ")", `\)`).Replace(m[1]))
			if err != nil {
				t.Fatal(err)
			}
			found := 0
			for path, text := range code {
				if strings.HasPrefix(path, m[2]+"/") && !strings.HasSuffix(path, "_test.go") {
					found += len(pattern.FindAllString(text, -1))
				}
			}
			if one := !strings.HasSuffix(m[1], "]"); found == 0 || one && found != 1 {
				t.Errorf("grep %q in %s finds %d places", m[1], m[2], found)
			}
		}
	}
	if searches < 7 {
		t.Errorf("%d searches", searches)
	}
}

// Fails when a page for people who read the code names a file that is not there.
func TestFilesThatPagesNameAreThere(t *testing.T) {
	pages, err := filepath.Glob("../docs/adr/*.md")
	if err != nil {
		t.Fatal(err)
	}
	code := sources(t)
	named := 0
	for _, page := range append(pages, "../docs/architecture.md", "../docs/limits.md", "../CONTRIBUTING.md") {
		for _, name := range regexp.MustCompile(`[a-z0-9_/]+\.go\b`).FindAllString(read(t, page), -1) {
			named++
			there := false
			for path := range code {
				there = there || path == name || strings.HasSuffix(path, "/"+name)
			}
			if !there {
				t.Errorf("%s: there is no %s", page, name)
			}
		}
	}
	if named < 20 {
		t.Errorf("%d files are named", named)
	}
}

// noImports leaves out what a constant takes from another package.
type noImports struct{}

func (noImports) Import(path string) (*types.Package, error) {
	return nil, fmt.Errorf("%s is not imported", path)
}

// constants returns the values of a package's constants that are whole numbers.
func constants(t *testing.T, dir string) map[string]int64 {
	t.Helper()
	set := token.NewFileSet()
	var files []*ast.File
	names, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		file, err := parser.ParseFile(set, name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, file)
	}
	check := types.Config{Importer: noImports{}, Error: func(error) {}, IgnoreFuncBodies: true}
	p, _ := check.Check(dir, set, files, nil)
	all := make(map[string]int64)
	for _, name := range p.Scope().Names() {
		if c, ok := p.Scope().Lookup(name).(*types.Const); ok && c.Val().Kind() == constant.Int {
			if n, exact := constant.Int64Val(c.Val()); exact {
				all[name] = n
			}
		}
	}
	return all
}

// Fails when docs/limits.md gives a constant of the code another value than the code, and when
// it lacks one whose name begins with "most" or "max".
func TestLimitsHaveTheValuesOfTheCode(t *testing.T) {
	var packages []string
	for path := range sources(t) {
		dir, name := filepath.Split(path)
		if name == "doc.go" && strings.HasPrefix(dir, "internal/") {
			packages = append(packages, filepath.Clean(dir))
		}
	}
	page := read(t, "../docs/limits.md")
	values := make(map[string]map[string]int64) // by constant and package
	for _, dir := range packages {
		for name, n := range constants(t, filepath.Join("..", dir)) {
			if values[name] == nil {
				values[name] = make(map[string]int64)
			}
			values[name][filepath.Base(dir)] = n
			isLimit := regexp.MustCompile("^(most|max)[A-Z]").MatchString(name)
			if isLimit && !strings.Contains(page, "`"+name+"`") {
				t.Errorf("%s: the page lacks %s, which is %d", dir, name, n)
			}
		}
	}
	compared := 0
	for _, row := range regexp.MustCompile(`(?m)^\| .* \|$`).FindAllString(page, -1) {
		cells := strings.Split(row, "|")
		said, where := strings.ReplaceAll(cells[2], ",", ""), cells[3]
		_, in, _ := strings.Cut(where, "` in `")
		in, _, _ = strings.Cut(in, "`")
		for _, m := range regexp.MustCompile("`([A-Za-z]+)`").FindAllStringSubmatch(where, -1) {
			ok := len(values[m[1]]) == 0 // no constant
			for name, n := range values[m[1]] {
				if in != "" && name != in {
					continue
				}
				compared++
				ok = ok || regexp.MustCompile(fmt.Sprintf(`\b(%d|%d MiB)\b`, n, n>>20)).MatchString(said)
			}
			if !ok {
				t.Errorf("%s is %v, and the page says%s", m[1], values[m[1]], cells[2])
			}
		}
	}
	if compared < 30 {
		t.Errorf("%d values are compared", compared)
	}
}

// Fails when README lists more limits than a newcomer reads, or loses the page that has all.
func TestReadmeNamesFewLimits(t *testing.T) {
	_, limits, _ := strings.Cut(read(t, "../README.md"), "\n## Limits\n")
	limits, _, _ = strings.Cut(limits, "\n## ")
	const page = "docs/what-it-cannot-do.md"
	if n := strings.Count(limits, "\n- "); n != 5 || !strings.Contains(limits, "]("+page+")") {
		t.Errorf("%d limits, or no link to %s:\n%s", n, page, limits)
	}
	if n := strings.Count(read(t, "../"+page), "\n- "); n < 24 {
		t.Errorf("%s has %d limits", page, n)
	}
}
