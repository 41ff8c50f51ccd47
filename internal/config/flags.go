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
	config texts
	subnet []texts // one per key of a subnet
	given  []texts // one per setting
}

// Register adds the flags to fs. Call it once, before fs.Parse.
func (f *Flags) Register(fs *pflag.FlagSet) {
	f.config.kind = "file"
	fs.Var(&f.config, "config", "configuration `file`; flags override it")
	f.subnet = register(fs, subnetKeys)
	f.given = register(fs, settings)
}

func register[C any](fs *pflag.FlagSet, all []setting[C]) []texts {
	given := make([]texts, len(all))
	for i, s := range all {
		if s.Flag == "" {
			continue
		}
		given[i] = texts{kind: s.Kind, def: flagText(s.initial())}
		flag := fs.VarPF(&given[i], s.Flag, "", s.Usage)
		if s.Kind == "bool" {
			flag.NoOptDefVal = "true" // otherwise the flag takes the next word as its value
		}
	}
	return given
}

// Resolve returns Default, overridden by the file of --config, overridden by the flags. A
// flag replaces the whole value of its key; --subnet replaces all subnets of the file. Each
// call reads the file again, so a reload is just another call. The error (see IsUsage)
// holds everything that is wrong. Contradictions between keys are checked once each key is
// right.
func (f *Flags) Resolve() (Config, error) {
	e, err := f.Effective()
	return e.Config, err
}

// Effective is Resolve, and says where each value comes from.
func (f *Flags) Effective() (Effective, error) {
	from := file{config: Default(), sources: make(map[string]string)}
	var errs []error
	var between, wrong error // contradictions between keys of the file; other errors of the file
	if n := len(f.config.given); n > 0 {
		if path := f.config.given[n-1]; path != "" {
			if from, between, wrong = load(path); wrong != nil {
				from = file{config: Default(), sources: make(map[string]string)}
			}
		} else { // for example from an unset variable in a script
			errs = append(errs, fmt.Errorf("--config: %w", expected("the path of a file", path)))
		}
	}
	c := &from.config
	for i, t := range f.given {
		if len(t.given) == 0 {
			continue
		}
		s := settings[i]
		from.sources[s.Name] = "--" + s.Flag
		if err := s.set(c, s.value(t.given)); err != nil {
			errs = append(errs, fmt.Errorf("--%s: %w", s.Flag, err))
		}
	}
	errs = append(errs, f.subnets(&from)...)
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
		return Effective{}, err
	}
	return Effective{*c, from.sources, from.subnet}, nil
}

// subnets replaces the subnets of the file by those of the flags, if there are any.
func (f *Flags) subnets(from *file) (errs []error) {
	var prefixes []string
	var like Subnet
	var others []string // flags that need a --subnet
	for i, t := range f.subnet {
		s := subnetKeys[i]
		switch {
		case len(t.given) == 0:
		case s.Name == "prefix":
			prefixes = t.given
		default:
			others = append(others, s.Flag)
			if err := s.set(&like, s.value(t.given)); err != nil {
				errs = append(errs, fmt.Errorf("--%s: %w", s.Flag, err))
			}
		}
	}
	if len(prefixes) == 0 {
		if len(others) > 0 && len(errs) == 0 {
			errs = append(errs, fmt.Errorf("--%s: expected a --subnet beside it", others[0]))
		}
		return errs
	}
	var l subnetList
	for _, p := range prefixes {
		if _, err := l.add("--subnet", p, like); err != nil {
			errs = append(errs, fmt.Errorf("--subnet: %w", err))
		}
	}
	l.set(&from.config)
	from.subnet = l
	return errs
}

// value converts the texts given to a flag into the value that the file would have. An
// empty text empties a list. For a single value the last text wins.
func (s setting[C]) value(given []string) any {
	one := func(text string) any {
		n, noNumber := strconv.ParseInt(text, 10, 64)
		b, noBool := strconv.ParseBool(text)
		switch s.Kind {
		case "number", "bytes", "bits", "port":
			if noNumber == nil {
				return n
			}
		case "bool":
			if noBool == nil {
				return b
			}
		}
		return text
	}
	if !s.List {
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
