package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strings"

	"github.com/BurntSushi/toml"
)

// Effective is a configuration with the source of each value.
type Effective struct {
	Config  Config
	sources map[string]string // by key; missing means the default
	subnets subnetList
}

// A Value is the value of one key, and where it comes from.
type Value struct {
	Value any `json:"value"` // as the file would have it
	// Source is "default", a line of the file such as "conenatd.toml:7", or a flag such as
	// "--lifetime".
	Source string `json:"source"`
	text   string // as TOML
}

// Values returns the value of each key outside subnets, by its name.
func (e *Effective) Values() map[string]Value {
	all := make(map[string]Value, len(settings))
	for _, s := range settings {
		text := s.get(&e.Config)
		all[s.Name] = Value{decode(text), cmp.Or(e.sources[s.Name], "default"), text}
	}
	return all
}

// decode returns the value of a literal.
func decode(literal string) any {
	var v struct{ V any }
	if _, err := toml.Decode("v = "+literal, &v); err != nil {
		panic("Literal wrote no TOML: " + literal)
	}
	return v.V
}

// A SubnetValue is one enabled subnet, and where it comes from.
type SubnetValue struct {
	Keys   map[string]any `json:"keys"`
	Source string         `json:"source"`
	text   []string
}

// Subnets returns the enabled subnets: those with a prefix, those of links, "auto".
func (e *Effective) Subnets() []SubnetValue {
	all := []SubnetValue{}
	add := func(prefix string, s Subnet, source string) {
		v := SubnetValue{Keys: map[string]any{"prefix": prefix}, Source: source}
		v.text = append(v.text, "prefix = "+quote(prefix))
		for _, k := range subnetKeys[1:] {
			if text := k.get(&s); text != k.initial() {
				v.Keys[k.Name] = decode(text)
				v.text = append(v.text, k.Name+" = "+text)
			}
		}
		all = append(all, v)
	}
	for i, s := range e.Config.Subnets {
		add(s.Prefix.String(), s, e.subnets.listAt[i])
	}
	for i, l := range e.Config.LinkSubnets {
		add(l.Link, l.Like, e.subnets.linksAt[i])
	}
	if e.Config.AutoSubnets {
		add("auto", Subnet{Routed: e.Config.AutoRouted}, e.subnets.autoAt)
	}
	return all
}

// WriteTOML writes a file that Load reads as the same configuration. A comment behind each
// value has its source.
func (e *Effective) WriteTOML(w io.Writer) error {
	var b strings.Builder
	values := e.Values()
	for _, s := range settings {
		v := values[s.Name]
		fmt.Fprintf(&b, "%s = %s # %s\n", s.Name, v.text, comment(v.Source))
	}
	for _, s := range e.Subnets() {
		fmt.Fprintf(&b, "\n[[subnet]] # %s\n%s\n", comment(s.Source), strings.Join(s.text, "\n"))
	}
	if e.Config.EnablesNone() {
		b.WriteString("\n# No subnet is enabled.\n")
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// comment makes a path fit to stand in a comment.
func comment(text string) string { return strings.Map(visible, text) }

// WriteJSON writes the same as JSON.
func (e *Effective) WriteJSON(w io.Writer) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(struct {
		Settings map[string]Value `json:"settings"`
		Subnets  []SubnetValue    `json:"subnets"`
	}{e.Values(), e.Subnets()})
}
