package config

import (
	"encoding/json"
	"maps"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

func effective(t *testing.T, args ...string) Effective {
	t.Helper()
	var f Flags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	f.Register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	e, err := f.Effective()
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// Fails when a value is not written, is written in another form than the file has, or loses
// something.
func TestWhatIsPrintedLoadsAsTheSame(t *testing.T) {
	subnets := strings.Replace(every, "[[subnet]]", "[[subnet]]\nport_pool = 7\n[[subnet]]", 1)
	for name, args := range map[string][]string{
		"default":        nil,
		"every key":      {"--config", write(t, every)},
		"subnet of each": {"--config", write(t, strings.ReplaceAll(subnets, "port_pool = 7", "prefix = \"10.0.0.0/8\"\nmapping = \"endpoint_independent\"\nport_pool = 7"))},
		"flags":          {"--subnet=192.168.1.0/24", "--lifetime=3h", "--exclude-port=1-65535", "--exclude-peer-port=7", "--exclude-peer-port=8", "--max-children=0", "--control-socket=/run/\"\\\x01é"},
	} {
		t.Run(name, func(t *testing.T) {
			e := effective(t, args...)
			var b strings.Builder
			if err := e.WriteTOML(&b); err != nil {
				t.Fatal(err)
			}
			got, err := Load(write(t, b.String()))
			if err != nil || !reflect.DeepEqual(got, e.Config) {
				t.Errorf("%v\ngot  %+v\nwant %+v\nfrom\n%s", err, got, e.Config, b.String())
			}
		})
	}
}

// Fails when a source is that of another key, or when a flag does not hide the file.
func TestEachValueHasItsSource(t *testing.T) {
	path := write(t, "# first\nlifetime = \"90s\"\nexclude_ports = [\n1]\n[[subnet]]\nprefix = \"lan0\"\n[[subnet]]\nrouted = true\nprefix = \"10.0.0.0/8\"\n[[subnet]]\nprefix = \"auto\"\n")
	e := effective(t, "--config", path, "--reconcile=1m", "--exclude-port=2")
	want := map[string]string{"lifetime": path + ":2", "reconcile": "--reconcile", "exclude_ports": "--exclude-port"}
	for name, v := range e.Values() {
		source := want[name]
		if source == "" {
			source = "default"
		}
		if v.Source != source {
			t.Errorf("%s: %q, want %q", name, v.Source, source)
		}
	}
	if got, want := sources(e), []string{path + ":9", path + ":6", path + ":11"}; !slices.Equal(got, want) {
		t.Errorf("subnets: %q, want %q", got, want)
	}
	if got := sources(effective(t, "--config", path, "--subnet=10.0.0.0/8")); !slices.Equal(got, []string{"--subnet"}) {
		t.Errorf("subnets of the flags: %q", got)
	}
}

func sources(e Effective) (all []string) {
	for _, s := range e.Subnets() {
		all = append(all, s.Source)
	}
	return all
}

func TestTheJSONHasEveryKey(t *testing.T) {
	e := effective(t, "--config", write(t, every))
	var b strings.Builder
	if err := e.WriteJSON(&b); err != nil {
		t.Fatal(err)
	}
	var got struct {
		Settings map[string]struct {
			Value  any
			Source string
		}
		Subnets []struct {
			Keys   map[string]any
			Source string
		}
	}
	if err := json.Unmarshal([]byte(b.String()), &got); err != nil {
		t.Fatal(err)
	}
	keys := slices.Sorted(maps.Keys(got.Settings))
	if want := slices.Sorted(slices.Values(names(settings))); !slices.Equal(keys, want) {
		t.Errorf("%q", keys)
	}
	if v := got.Settings["lifetime"].Value; v != "1m30s" {
		t.Errorf("lifetime: %v", v)
	}
	if len(got.Subnets) != 4 || got.Subnets[1].Keys["filtering"] != "address_and_port_dependent" {
		t.Errorf("%+v", got.Subnets)
	}
}

// Fails when a field of Config or Subnet has no key.
func TestEveryFieldHasItsKey(t *testing.T) {
	var keys []string
	for _, s := range Sections() {
		for _, k := range s.Keys {
			keys = append(keys, k.Name)
		}
	}
	if want := names(settings); !slices.Equal(keys, want) {
		t.Errorf("the sections have %q\nwant %q", keys, want)
	}
	has := func(keys []string, typ reflect.Type, not ...string) {
		for field := range typ.Fields() {
			if key := subnetKey(field.Name); !slices.Contains(keys, key) && !slices.Contains(not, field.Name) {
				t.Errorf("%s.%s: no key %s", typ.Name(), field.Name, key)
			}
		}
	}
	has(keys, reflect.TypeFor[Config](), "Subnets", "LinkSubnets", "AutoSubnets", "AutoRouted")
	has(names(subnetKeys), reflect.TypeFor[Subnet]())
	for _, k := range slices.Concat(flat(Sections()), SubnetKeys()) {
		if k.Doc == "" || k.Kind == "" || k.Usage == "" && k.Flag != "" {
			t.Errorf("%s is not documented", k.Name)
		}
	}
}

func flat(sections []Section) (all []Key) {
	for _, s := range sections {
		all = append(all, s.Keys...)
	}
	return all
}

func TestNearest(t *testing.T) {
	words := []string{"lifetime", "learn", "learn_rate", "self", ""}
	for text, want := range map[string]string{
		"lifetime": "lifetime", "lifetmie": "lifetime", "Learn-Rate": "learn_rate", "learned": "learn", "slef": "self",
		"": "", "x": "", "mtu": "", "seal": "", strings.Repeat("lifetime", 9): "",
	} {
		if got := nearest(text, words); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}
