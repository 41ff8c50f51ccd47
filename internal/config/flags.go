package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/pflag"
)

// Flags are the flags of "conenatd run". The zero value is ready for Register.
type Flags struct {
	config  texts
	subnets texts
	routed  bool
	filters texts
	mapping texts
	given   []texts // one per setting
}

// Register adds the flags to fs. Call it once, before fs.Parse.
func (f *Flags) Register(fs *pflag.FlagSet) {
	f.config.kind = "file"
	fs.Var(&f.config, "config", "configuration `file`; flags go before it")
	f.subnets.kind = "prefix"
	fs.Var(&f.subnets, "subnet", `inside prefix to enable, a link for its prefixes, or "auto", instead of those of the file (repeatable)`)
	fs.BoolVar(&f.routed, "routed", false, "the subnets of --subnet are routed, not only NATed")
	f.filters = texts{kind: "name", def: AddressDependent.String()}
	fs.Var(&f.filters, "filtering", "who may send to the hosts of --subnet: address_dependent, endpoint_independent (anybody) or address_and_port_dependent (no permissions)")
	f.mapping = texts{kind: "name", def: KernelMapping.String()}
	fs.Var(&f.mapping, "mapping", "how the hosts of --subnet get their outside ports: kernel, or endpoint_independent (one for each inside port, and nobody else's)")
	f.given = make([]texts, len(settings))
	for i, s := range settings {
		f.given[i] = texts{kind: s.kind, def: s.def}
		flag := fs.VarPF(&f.given[i], s.flag, "", s.usage)
		if s.truth {
			flag.NoOptDefVal = "true" // otherwise the flag takes the next word as its value
		}
	}
}

// Resolve returns Default, overridden by the file of --config, overridden by the flags. A
// flag replaces the whole value of its key; --subnet replaces all subnets of the file. Each
// call reads the file again, so a reload is just another call. The error (see IsUsage)
// holds everything that is wrong. Contradictions between keys are checked once each key is
// right.
func (f *Flags) Resolve() (Config, error) {
	c := Default()
	var errs []error
	var between, wrong error // contradictions between keys of the file; other errors of the file
	if n := len(f.config.given); n > 0 {
		if path := f.config.given[n-1]; path != "" {
			c, between, wrong = load(path)
		} else { // for example from an unset variable in a script
			errs = append(errs, fmt.Errorf("--config: %w", expected("the path of a file", path)))
		}
	}
	for i, t := range f.given {
		if len(t.given) == 0 {
			continue
		}
		if err := settings[i].set(&c, settings[i].value(t.given)); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", settings[i].flag, err))
		}
	}

	var l subnetList
	like := Subnet{Routed: f.routed}
	if n := len(f.filters.given); n > 0 {
		var err error
		if like.Filtering, err = filtering(f.filters.given[n-1]); err != nil {
			errs = append(errs, fmt.Errorf("--filtering: %w", err))
		}
	}
	if n := len(f.mapping.given); n > 0 {
		var err error
		if like.Mapping, err = mapping(f.mapping.given[n-1]); err != nil {
			errs = append(errs, fmt.Errorf("--mapping: %w", err))
		}
	}
	for _, s := range f.subnets.given {
		if err := l.add("--subnet", s, like); err != nil {
			errs = append(errs, fmt.Errorf("--subnet: %w", err))
		}
	}
	switch {
	case len(f.subnets.given) > 0:
		l.set(&c)
	case f.routed:
		errs = append(errs, errors.New("--routed: expected a --subnet beside it"))
	case len(f.filters.given) > 0:
		errs = append(errs, errors.New("--filtering: expected a --subnet beside it"))
	case len(f.mapping.given) > 0:
		errs = append(errs, errors.New("--mapping: expected a --subnet beside it"))
	}
	if wrong == nil && len(errs) == 0 {
		if key, err := c.check(); err != nil {
			err = fmt.Errorf("%s: %w", key, err)
			if between != nil && strings.HasSuffix(between.Error(), err.Error()) {
				err = between // it has the line number
			}
			errs = append(errs, err)
		}
	}
	if err := errors.Join(wrong, usage(errs...)); err != nil {
		return Config{}, err
	}
	return c, nil
}

// value converts the texts given to a flag into the value that the file would have. An
// empty text empties a list. For a single value the last text wins.
func (s setting) value(given []string) any {
	one := func(text string) any {
		if n, err := strconv.ParseInt(text, 10, 64); s.number && err == nil {
			return n
		}
		if b, err := strconv.ParseBool(text); s.truth && err == nil {
			return b
		}
		return text
	}
	if !s.list {
		return one(given[len(given)-1])
	}
	items := []any{}
	for _, text := range given {
		if text != "" {
			items = append(items, one(text))
		}
	}
	return items
}

// texts is a pflag.Value that keeps the text as typed. Resolve checks it, so that flags and
// file share the checks and the form of errors.
type texts struct {
	given     []string
	kind, def string
}

func (t *texts) Set(s string) error {
	t.given = append(t.given, s)
	return nil
}

func (t *texts) String() string {
	if len(t.given) == 0 {
		return t.def
	}
	return strings.Join(t.given, ",")
}

func (t *texts) Type() string { return t.kind }
