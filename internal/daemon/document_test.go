package daemon

import (
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/engine"
)

// constants returns the values of the string constants of this package, the engine and mapping, by
// type.
func constants(t *testing.T) map[string][]string {
	t.Helper()
	var files []string
	for _, pattern := range []string{"*.go", "../engine/*.go", "../mapping/*.go"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	all := make(map[string][]string)
	for _, name := range files {
		file, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			spec, ok := n.(*ast.ValueSpec)
			if !ok {
				return true
			}
			typ, _ := spec.Type.(*ast.Ident)
			if of, ok := spec.Type.(*ast.SelectorExpr); ok { // of another package
				typ = of.Sel
			}
			for _, v := range spec.Values {
				if lit, ok := v.(*ast.BasicLit); ok && typ != nil && lit.Kind == token.STRING {
					text, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					all[typ.Name] = append(all[typ.Name], text)
				}
			}
			return true
		})
	}
	return all
}

// Fails when an identifier is in the code or in docs/control.md alone.
func TestTheDocumentHasTheIdentifiers(t *testing.T) {
	own := constants(t)
	var reasons []string
	for r := cone.ReasonNone + 1; int(r) < cone.Reasons; r++ {
		reasons = append(reasons, r.String())
	}
	var repairs []string
	for p := range engine.Parts {
		repairs = append(repairs, p.String())
	}
	want := map[string][]string{
		"States":                     {cone.StateStanding.String(), cone.StateRefused.String(), cone.StateWaiting.String()},
		"Carriers":                   {cone.ByExpectation.String(), cone.ByMap.String(), cone.AllCarriers.String()},
		"Reasons":                    reasons,
		"Repairs":                    repairs,
		"Requests":                   own["Request"],
		"Mappings not applied":       own["Unmapped"],
		"Why a subnet is carried so": own["why"],
		"Warnings":                   own["warningID"],
		"Events": {
			cone.EventGranted.String(), cone.EventRefused.String(), cone.EventRevoked.String(), cone.EventChild.String(),
			cone.EventChildGone.String(), control.EventBegin, control.EventLost,
		},
		"Steps":    own["step"],
		"Results":  own["result"],
		"Verdicts": own["verdict"],
		"Wrong":    own["wrong"],
		"Filtering and mapping": {
			config.AddressDependent.String(), config.EndpointIndependent.String(), config.AddressAndPortDependent.String(),
			config.KernelMapping.String(), config.EndpointIndependentMapping.String(),
		},
	}
	text, err := os.ReadFile("../../docs/control.md")
	if err != nil {
		t.Fatal(err)
	}
	_, identifiers, _ := strings.Cut(string(text), "\n## Identifiers\n")
	got := make(map[string][]string)
	for _, section := range strings.Split(identifiers, "\n### ")[1:] {
		heading, body, _ := strings.Cut(section, "\n")
		for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(body, -1) {
			got[heading] = append(got[heading], m[1])
		}
	}
	for _, lists := range []map[string][]string{want, got} {
		for heading, ids := range maps.All(lists) {
			lists[heading] = slices.Compact(slices.Sorted(slices.Values(ids)))
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-code +document:\n%s", diff)
	}
}
