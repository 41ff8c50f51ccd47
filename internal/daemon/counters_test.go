package daemon

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/control"
)

// Fails when a tag in internal/control/wire.go names a counter that no rule counts with, or
// when Count leaves a member alone or gives it another counter.
func TestCountersOfTheStatusAreThoseOfTheRules(t *testing.T) {
	files, err := filepath.Glob("../rules/testdata/tables/*")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	var printed strings.Builder
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		printed.Write(text)
	}
	counters := map[string]uint64{}
	want := map[string]uint64{} // by Go name
	parts := reflect.TypeFor[control.Tables]()
	for i := range parts.NumField() {
		part := parts.Field(i)
		if part.Type.Kind() != reflect.Struct {
			continue
		}
		for j := range part.Type.NumField() {
			field := part.Type.Field(j)
			name, ok := field.Tag.Lookup("counter")
			if !ok {
				continue
			}
			if !strings.Contains(printed.String(), `counter name "`+name+`"`) {
				t.Errorf("%s.%s: no rule has the counter %s", part.Name, field.Name, name)
			}
			counters[name] = uint64(len(counters) + 1)
			want[part.Name+"."+field.Name] = counters[name]
		}
	}
	var st control.Tables
	st.Count(counters)
	for name, n := range want {
		part, field, _ := strings.Cut(name, ".")
		if got := reflect.ValueOf(st).FieldByName(part).FieldByName(field).Uint(); got != n {
			t.Errorf("%s is %d, want %d", name, got, n)
		}
	}
	if len(want) == 0 {
		t.Error("no member has a counter")
	}
}
