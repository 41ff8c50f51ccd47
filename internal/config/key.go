package config

import (
	"fmt"
	"slices"
	"strings"
)

// A Key describes one key of the configuration file. The help of the flags, the manual
// pages, the reference, the example file and the JSON schema are made from it.
type Key struct {
	// Name is the key in the file.
	Name string
	// Flag is the flag of "conenatd run", without dashes: the key with dashes, in the
	// singular if it may be repeated.
	Flag string
	// Kind says what a value is: word, name, duration, bool, number, bytes, bits, link,
	// prefix, port, ports, path or endpoint.
	Kind string
	// List is set if the file has an array and the flag may be repeated.
	List bool
	// Words has the only values of a word, and the words that another kind accepts as well.
	Words []string
	// Min and Max are the limits of a number, both included.
	Min, Max int64
	// Range has the limits of a value that is not a number, such as "1s to 24h".
	Range string
	// Restart is set if a change needs a restart; otherwise a reload suffices.
	Restart bool
	// Usage is the line for --help.
	Usage string
	// Doc says what the key means, in one paragraph.
	Doc string
	// Default is the value of an empty file, as TOML.
	Default string
}

// A Section has keys that belong together.
type Section struct {
	Title string
	Keys  []Key
}

// A setting is a key of a C, which is a Config or a Subnet.
type setting[C any] struct {
	Key
	access[C]
}

// access reads and writes the field of a key.
type access[C any] struct {
	// set checks v, a value as TOML decodes it, and stores it.
	set func(c *C, v any) error
	// get returns the value as TOML.
	get func(c *C) string
	// words are those that a value may be.
	words []string
}

// settings has every key except subnet, once.
var settings = slices.Concat(basicKeys, linkKeys, mappingKeys, peerKeys, limitKeys, kernelKeys, daemonKeys)

// Sections returns all keys except those of subnets, in the order of the reference.
func Sections() []Section {
	return []Section{
		{"Basics", keys(basicKeys)},
		{"Links", keys(linkKeys)},
		{"Endpoint-independent mapping", keys(mappingKeys)},
		{"Peers and ports", keys(peerKeys)},
		{"Limits", keys(limitKeys)},
		{"Work in the kernel", keys(kernelKeys)},
		{"The daemon", keys(daemonKeys)},
	}
}

// SubnetKeys returns the keys of a [[subnet]] table.
func SubnetKeys() []Key { return keys(subnetKeys) }

// keys returns what users may know of settings.
func keys[C any](all []setting[C]) (out []Key) {
	for _, s := range all {
		k := s.Key
		k.Words, k.Default = s.words, s.initial()
		out = append(out, k)
	}
	return out
}

// initial returns the default, as TOML.
func (s setting[C]) initial() string {
	var c C
	if d, ok := any(&c).(*Config); ok {
		*d = Default()
	}
	return s.get(&c)
}

// find returns the setting with this name.
func find[C any](all []setting[C], name string) (s setting[C], ok bool) {
	i := slices.IndexFunc(all, func(s setting[C]) bool { return s.Name == name })
	if i < 0 {
		return s, false
	}
	return all[i], true
}

func names[C any](all []setting[C]) (out []string) {
	for _, s := range all {
		out = append(out, s.Name)
	}
	return out
}

// topKeys returns the keys that are allowed outside tables.
func topKeys() []string { return append(names(settings), "subnet") }

// flagText returns a value as a flag takes it.
func flagText(literal string) string {
	return strings.NewReplacer(`"`, "", "[", "", "]", "", " ", "").Replace(literal)
}

// one returns the access to a single value.
func one[C, T any](parse func(any) (T, error), field func(*C) *T) access[C] {
	return access[C]{
		set: func(c *C, v any) error {
			t, err := parse(v)
			if err == nil {
				*field(c) = t
			}
			return err
		},
		get: func(c *C) string { return Literal(*field(c)) },
	}
}

// list returns the access to an array of values. The array replaces the default.
func list[C, T any](example string, parse func(any) (T, error), field func(*C) *[]T) access[C] {
	return one(array(example, parse), field)
}

// word returns the access to a value that is one of several words.
func word[C, T any](field func(*C) *T, all ...T) access[C] {
	var words []string
	for _, t := range all {
		words = append(words, strings.ToLower(fmt.Sprint(t)))
	}
	a := one(func(v any) (t T, err error) {
		s, _ := v.(string)
		if i := slices.Index(words, s); i >= 0 {
			return all[i], nil
		}
		return t, expectedWord(words, v)
	}, field)
	a.words = words
	return a
}

// orWords adds the words that a value may be as well.
func (a access[C]) orWords(words ...string) access[C] {
	a.words = words
	return a
}
