package config

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"unicode"

	"github.com/BurntSushi/toml"
)

// Load reads and checks the file at path. Keys that the file does not set are as in
// Default. The error (see IsUsage) holds everything that is wrong, one line each, in the
// order of the file; the Config is then empty.
func Load(path string) (Config, error) {
	c, between, err := load(path)
	if err = errors.Join(err, between); err != nil {
		return Config{}, err
	}
	return c, nil
}

// load is Load, but returns contradictions between keys separately, because flags may
// override one of the keys.
func load(path string) (c Config, between, err error) {
	data, err := readFile(path)
	if err != nil {
		// The path goes in front here too, so keep only the cause.
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err
		}
		return Config{}, nil, fmt.Errorf("%s: expected a readable file: %w", path, err)
	}
	return parse(path, string(data))
}

// parse is load without reading the file.
//
// It decodes into plain maps and walks them itself. Decoding into a struct would meet the
// keys in random order, stop at the first wrong type, and keep only the last of several
// [[subnet]] tables.
func parse(path, data string) (c Config, between, err error) {
	data = strings.TrimPrefix(data, "\ufeff")
	var root map[string]any
	if _, err := toml.Decode(data, &root); err != nil {
		return Config{}, nil, usage(syntaxError(path, data, err))
	}

	f := file{path: path, lines: findLines(data), config: Default()}
	for _, key := range f.sorted(0, root) {
		i := slices.IndexFunc(settings, func(s setting) bool { return s.key == key })
		switch {
		case key == "subnet":
			f.subnets(root[key])
		case i < 0:
			f.fail(0, key, fmt.Errorf("unknown key, expected one of %s", strings.Join(topKeys(), ", ")))
		default:
			f.fail(0, key, settings[i].set(&f.config, root[key]))
		}
	}
	if err := usage(f.errs...); err != nil {
		return Config{}, nil, err
	}
	key, err := f.config.check()
	f.fail(0, key, err)
	return f.config, usage(f.errs...), nil
}

// bare is the text of a value that is not valid TOML. No check accepts it.
type bare string

// syntaxError converts an error of the decoder into our form. The decoder knows TOML but
// not our keys: for 5m without quotes it reports a missing newline. So if a line by itself
// is invalid, say what its key expects.
func syntaxError(path, data string, err error) error {
	var pe toml.ParseError
	if !errors.As(err, &pe) {
		return fmt.Errorf("%s: not valid TOML: %w", path, err)
	}
	text := "not valid TOML: " + pe.Message
	if pe.LastKey != "" {
		text = pe.LastKey + ": " + text
	}
	line := nthLine(data, pe.Position.Line)
	key, value, isPair := strings.Cut(line, "=")
	if _, err := toml.Decode(line, new(map[string]any)); err != nil && isPair {
		if name, err := check(strings.TrimSpace(key), bare(strings.TrimSpace(value))); err != nil {
			text = fmt.Sprintf("%s: %v (not valid TOML: %s)", name, err, pe.Message)
		}
	}
	return fmt.Errorf("%s:%d: %s", path, pe.Position.Line, strings.Map(visible, text))
}

// visible replaces control characters of a broken file, so that they do not reach the
// terminal.
func visible(r rune) rune {
	if unicode.IsPrint(r) {
		return r
	}
	return unicode.ReplacementChar
}

// nthLine returns a line of data, counted from 1, or "".
func nthLine(data string, n int) string {
	for line := range strings.Lines(data) {
		if n--; n == 0 {
			return line
		}
	}
	return ""
}

// check returns the full name of a key, found by its last part, and the error for v if the
// key is known and v is wrong.
func check(key string, v any) (name string, err error) {
	switch key {
	case "prefix":
		return "subnet.prefix", new(subnetList).add("", v, Subnet{})
	case "filtering":
		_, err := filtering(v)
		return "subnet.filtering", err
	case "mapping":
		_, err := mapping(v)
		return "subnet.mapping", err
	case "routed":
		return "subnet.routed", expected("true or false", v)
	}
	for _, s := range settings {
		if s.key == key {
			return key, s.set(new(Config), v)
		}
	}
	return "", nil
}

// topKeys returns the keys that are allowed outside tables.
func topKeys() []string {
	var keys []string
	for _, s := range settings {
		keys = append(keys, s.key)
	}
	return append(keys, "subnet")
}

// A file is the walk through one decoded file.
type file struct {
	path   string
	lines  lines
	config Config
	errs   []error
}

// at returns the position of a key: "conenatd.toml:7".
func (f *file) at(subnet int, key string) string {
	return fmt.Sprintf("%s:%d", f.path, f.lines.of(subnet, key))
}

// fail records err, unless it is nil, for a key of a table (see place).
func (f *file) fail(subnet int, key string, err error) {
	if err == nil {
		return
	}
	name := toml.Key{key}
	if subnet > 0 {
		name = toml.Key{"subnet", key}
	}
	f.errs = append(f.errs, fmt.Errorf("%s: %s: %w", f.at(subnet, key), name, err))
}

// sorted returns the keys of a table in the order of the file.
func (f *file) sorted(subnet int, table map[string]any) []string {
	return slices.SortedFunc(maps.Keys(table), func(a, b string) int {
		return cmp.Or(cmp.Compare(f.lines.of(subnet, a), f.lines.of(subnet, b)), strings.Compare(a, b))
	})
}

// subnets checks all [[subnet]] tables, or an array of inline tables.
func (f *file) subnets(v any) {
	tables, ok := v.([]map[string]any)
	if items, inline := v.([]any); inline {
		ok = true
		for _, item := range items {
			table, isTable := item.(map[string]any)
			ok = ok && isTable
			tables = append(tables, table)
		}
	}
	if !ok {
		f.fail(0, "subnet", expected("tables that begin with [[subnet]]", v))
		return
	}

	var l subnetList
	for i, table := range tables {
		n := i + 1
		routed, isBool := table["routed"].(bool)
		s := Subnet{Routed: routed}
		var noFiltering, noMapping, noPool error
		if v, ok := table["filtering"]; ok {
			s.Filtering, noFiltering = filtering(v)
		}
		if v, ok := table["mapping"]; ok {
			s.Mapping, noMapping = mapping(v)
		}
		if v, ok := table["port_pool"]; ok && v != "" {
			s.PortPool, noPool = portPool(v)
		}
		if _, ok := table["prefix"]; !ok {
			table["prefix"] = nil // required: let the check below report it
		}
		for _, key := range f.sorted(n, table) {
			switch {
			case key == "prefix":
				f.fail(n, key, l.add(f.at(n, key), table[key], s))
			case key == "filtering":
				f.fail(n, key, noFiltering)
			case key == "mapping":
				f.fail(n, key, noMapping)
			case key == "port_pool":
				f.fail(n, key, noPool)
			case key != "routed":
				f.fail(n, key, unknownInSubnet(key))
			case !isBool:
				f.fail(n, key, expected("true or false", table[key]))
			}
		}
	}
	l.set(&f.config)
}

func unknownInSubnet(key string) error {
	const what = "unknown key, expected prefix, routed, filtering, mapping or port_pool"
	// In TOML a table has no end: all keys that follow its header belong to it.
	if slices.Contains(topKeys(), key) {
		return fmt.Errorf("%s; %s stands above the first [[subnet]]", what, key)
	}
	return errors.New(what)
}
