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
	"unicode/utf8"

	"github.com/BurntSushi/toml"
)

// Load reads and checks the file at path. Keys that the file does not set are as in
// Default. The error (see IsUsage) holds everything that is wrong, one line each, in the
// order of the file; the Config is then empty.
func Load(path string) (Config, error) {
	f, between, err := load(path)
	if err = errors.Join(err, between); err != nil {
		return Config{}, err
	}
	return f.config, nil
}

// load is Load, but returns contradictions between keys separately, because flags may
// override one of the keys.
func load(path string) (f file, between, err error) {
	data, err := readFile(path)
	if err != nil {
		// The path goes in front here too, so keep only the cause.
		if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
			err = pe.Err
		}
		return file{}, nil, fmt.Errorf("%s: expected a readable file: %w", path, err)
	}
	return parse(path, string(data))
}

// parse is load without reading the file.
//
// It decodes into plain maps and walks them itself. Decoding into a struct would meet the
// keys in random order, stop at the first wrong type, and keep only the last of several
// [[subnet]] tables.
func parse(path, data string) (f file, between, err error) {
	data = strings.TrimPrefix(data, "\ufeff")
	var root map[string]any
	if _, err := toml.Decode(data, &root); err != nil {
		return file{}, nil, usage(syntaxError(path, data, err))
	}

	f = file{path: path, found: findPositions(data), config: Default(), sources: make(map[string]string)}
	for _, key := range f.sorted(0, root) {
		setting, known := find(settings, key)
		switch {
		case key == "subnet":
			f.subnets(root[key])
		case known:
			f.sources[key] = f.line(0, key)
			f.failValue(0, key, setting.set(&f.config, root[key]))
		default:
			f.fail(0, key, unknownKey(key, root[key]))
		}
	}
	if err := usage(f.errs...); err != nil {
		return file{}, nil, err
	}
	key, err := f.config.check()
	f.failValue(0, key, err)
	return f, usage(f.errs...), nil
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
	at := position{pe.Position.Line, column(line, pe.Position.Col)}
	// Where something is missing at the end of a line, the decoder may name the next one.
	start := min(pe.Position.Start, len(data)) // it may be negative at the start of the file
	if n := 1 + strings.Count(data[:max(start, 0)], "\n"); start >= 0 && n < at.line {
		line = nthLine(data, n)
		at = position{n, column(line, len(line)+1)}
	}
	key, value, isPair := strings.Cut(line, "=")
	value = strings.TrimSpace(value)
	readable := utf8.ValidString(value) && !strings.ContainsFunc(value, func(r rune) bool { return unicode.IsControl(r) && r != '\t' })
	if _, err := toml.Decode(line, new(map[string]any)); err != nil && isPair && readable {
		if name, err := check(strings.TrimSpace(key), bare(value)); err != nil {
			text = fmt.Sprintf("%s: %v (not valid TOML: %s)", name, err, pe.Message)
		}
	}
	if strings.Contains(pe.Message, "already been defined") {
		// What stands before the line is valid.
		lines := strings.SplitAfter(data, "\n")
		before := findPositions(strings.Join(lines[:min(at.line-1, len(lines))], ""))
		table, name, first := before.last(pe.LastKey)
		if first.line > 0 {
			at.column = len(line) - len(strings.TrimLeft(line, " \t")) + 1
			text = fmt.Sprintf("%s: expected once in %s, but line %d has it, too; keep one of the two", name, table, first.line)
		}
	}
	return fmt.Errorf("%s:%v: %s", path, at, strings.Map(visible, text))
}

// column converts a column in bytes into one in characters.
func column(line string, bytes int) int {
	return utf8.RuneCountInString(line[:min(max(bytes-1, 0), len(line))]) + 1
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
	if s, ok := find(settings, key); ok {
		return key, s.set(new(Config), v)
	}
	if s, ok := find(subnetKeys, key); ok {
		return "subnet." + key, s.set(new(Subnet), v)
	}
	return "", nil
}

// A file is the walk through one decoded file.
type file struct {
	path    string
	found   positions
	config  Config
	sources map[string]string // by key, "conenatd.toml:7"
	subnet  subnetList
	errs    []error
}

// line returns the line of a key: "conenatd.toml:7".
func (f *file) line(subnet int, key string) string {
	return fmt.Sprintf("%s:%d", f.path, f.found.of(subnet, key).key.line)
}

// fail records err, unless it is nil, for a key of a table (see place).
func (f *file) fail(subnet int, key string, err error) {
	f.failAt(f.found.of(subnet, key).key, subnet, key, err)
}

// failValue is fail for the value of a key. If err is about one item, it is found there.
func (f *file) failValue(subnet int, key string, err error) {
	x := f.found.of(subnet, key)
	at := x.value
	if item := (*itemError)(nil); errors.As(err, &item) && item.index < len(x.items) {
		at = x.items[item.index]
	}
	if at == (position{}) { // a header, or a key that is missing
		at = x.key
	}
	f.failAt(at, subnet, key, err)
}

func (f *file) failAt(at position, subnet int, key string, err error) {
	if err == nil {
		return
	}
	name := toml.Key{key}
	if subnet > 0 {
		name = toml.Key{"subnet", key}
	}
	f.errs = append(f.errs, fmt.Errorf("%s:%v: %s: %w", f.path, at, name, err))
}

// sorted returns the keys of a table in the order of the file.
func (f *file) sorted(subnet int, table map[string]any) []string {
	return slices.SortedFunc(maps.Keys(table), func(a, b string) int {
		x, y := f.found.of(subnet, a).key, f.found.of(subnet, b).key
		return cmp.Or(cmp.Compare(x.line, y.line), cmp.Compare(x.column, y.column), strings.Compare(a, b))
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
		f.failValue(0, "subnet", expected("tables that begin with [[subnet]]", v))
		return
	}

	for i, table := range tables {
		n := i + 1
		var s Subnet
		wrong := make(map[string]error)
		for key, v := range table {
			if setting, ok := find(subnetKeys, key); !ok {
				wrong[key] = unknownInSubnet(key)
			} else if key != "prefix" {
				wrong[key] = setting.set(&s, v)
			}
		}
		// prefix is required, so check it even if it is missing.
		key, err := f.subnet.add(f.line(n, "prefix"), table["prefix"], s)
		if _, ok := table["prefix"]; !ok {
			table["prefix"] = nil
		}
		if wrong[key] == nil {
			wrong[key] = err
		}
		for _, key := range f.sorted(n, table) {
			if _, known := find(subnetKeys, key); known {
				f.failValue(n, key, wrong[key])
			} else {
				f.fail(n, key, wrong[key])
			}
		}
	}
	f.subnet.set(&f.config)
}

// unknownKey returns the error for a key, with this value, that no table has outside
// subnets.
func unknownKey(key string, v any) error {
	if near := nearest(key, topKeys()); near == "subnet" {
		return errors.New("unknown key; did you mean [[subnet]]?")
	} else if near != "" {
		return fmt.Errorf("unknown key; did you mean %s?", near)
	}
	if _, ok := find(subnetKeys, key); ok {
		return fmt.Errorf("unknown key; %s stands in a table that begins with [[subnet]]", key)
	}
	switch v.(type) {
	case map[string]any, []map[string]any:
		return errors.New("unknown table; the only one is [[subnet]]")
	}
	return fmt.Errorf("unknown key, expected one of %s", strings.Join(topKeys(), ", "))
}

func unknownInSubnet(key string) error {
	// In TOML a table has no end: all keys that follow its header belong to it.
	if slices.Contains(topKeys(), key) {
		return fmt.Errorf("unknown key of a subnet; %s stands above the first [[subnet]]", key)
	}
	all := names(subnetKeys)
	if near := nearest(key, all); near != "" {
		return fmt.Errorf("unknown key of a subnet; did you mean %s?", near)
	}
	return fmt.Errorf("unknown key of a subnet, expected %s", orList(all))
}
