package control

import (
	"encoding"
	"maps"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// sections returns the text below each heading of docs/control.md.
func sections(t *testing.T) map[string]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/control.md")
	if err != nil {
		t.Fatal(err)
	}
	all := make(map[string]string)
	for _, s := range regexp.MustCompile(`(?m)^##+ `).Split(string(text), -1)[1:] {
		heading, body, _ := strings.Cut(s, "\n")
		all[heading] = body
	}
	return all
}

var rowOfMembers = regexp.MustCompile("(?m)^\\| `([^`]+)` \\| ([A-Za-z, ]+) \\|")

// documented returns the members that a section describes, with their types.
func documented(section string) map[string]string {
	all := make(map[string]string)
	for _, m := range rowOfMembers.FindAllStringSubmatch(section, -1) {
		all[m[1]] = m[2]
	}
	return all
}

// members returns the members of the JSON that t makes, with their types.
func members(t reflect.Type) map[string]string {
	all := make(map[string]string)
	for i := range t.NumField() {
		f := t.Field(i)
		if f.Anonymous { // its members are members of t
			maps.Copy(all, members(f.Type))
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		optional := ""
		if options != "" {
			optional = ", optional"
		}
		for path, kind := range values(f.Type) {
			all[name+path] = kind + optional
		}
	}
	return all
}

var textual = reflect.TypeFor[encoding.TextMarshaler]()

// values returns the paths of simple values within a value of type t, with their types.
func values(t reflect.Type) map[string]string {
	if t == reflect.TypeFor[time.Time]() || t.Implements(textual) {
		return map[string]string{"": "string"}
	}
	within := func(prefix string, values map[string]string) map[string]string {
		all := make(map[string]string)
		for path, kind := range values {
			all[prefix+path] = kind
		}
		return all
	}
	switch t.Kind() {
	case reflect.String:
		return map[string]string{"": "string"}
	case reflect.Bool:
		return map[string]string{"": "boolean"}
	case reflect.Int, reflect.Uint16, reflect.Uint64, reflect.Float64:
		return map[string]string{"": "number"}
	case reflect.Pointer:
		return map[string]string{"": t.Elem().Name()} // it has a section of its own
	case reflect.Slice:
		return within("[]", values(t.Elem()))
	case reflect.Map:
		return within(".*", values(t.Elem()))
	case reflect.Struct:
		return within(".", members(t))
	}
	panic("no JSON that the document knows: " + t.String())
}

// Fails when a path, a member or its type is only in the code or only in the document.
func TestTheDocumentDescribesTheWire(t *testing.T) {
	answers := map[string]reflect.Type{
		pathPermissions: reflect.TypeFor[Permission](),
		pathStatus:      reflect.TypeFor[Status](),
		pathVerify:      reflect.TypeFor[Verification](),
		pathExplain:     reflect.TypeFor[Explanation](),
		pathWatch:       reflect.TypeFor[Event](),
		pathReload:      reflect.TypeFor[struct{}](),
		pathRevoke:      reflect.TypeFor[result](),
		pathFlush:       reflect.TypeFor[result](),
	}
	all := sections(t)
	requests := make(map[string]string)
	for heading, body := range all {
		method, path, ok := strings.Cut(strings.Trim(heading, "`"), " /")
		if !ok || heading[0] != '`' {
			continue
		}
		requests["/"+path] = method
		answer, known := answers["/"+path]
		if !known {
			continue // the methods will differ
		}
		if diff := cmp.Diff(members(answer), documented(body)); diff != "" {
			t.Errorf("%s (-code +document):\n%s", heading, diff)
		}
	}
	if diff := cmp.Diff(methods, requests); diff != "" {
		t.Errorf("requests (-code +document):\n%s", diff)
	}
	if diff := cmp.Diff(members(reflect.TypeFor[failure]()), documented(all["Errors"])); diff != "" {
		t.Errorf("errors (-code +document):\n%s", diff)
	}
}

// Fails when there is prose for an identifier that the document lacks. A test of the daemon
// checks that document and daemon have the same identifiers.
func TestProseIsForIdentifiersOfTheDocument(t *testing.T) {
	known := make(map[string]bool)
	for _, body := range sections(t) {
		for _, m := range regexp.MustCompile("(?m)^\\| `([a-z_+]+)` \\|").FindAllStringSubmatch(body, -1) {
			known[m[1]] = true
		}
	}
	for id := range prose {
		if !known[id] {
			t.Errorf("%s: %q", id, prose[id])
		}
	}
}
