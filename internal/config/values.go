package config

import (
	"fmt"
	"math/bits"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// expected returns the error for a value that differs from what was expected.
func expected(what string, got any) error {
	return fmt.Errorf("expected %s, got %s", what, literal(got))
}

// array accepts an array of values. An error is an itemError if one of them is wrong.
func array[T any](example string, parse func(any) (T, error)) func(any) ([]T, error) {
	return func(v any) (ts []T, err error) {
		items, ok := v.([]any)
		if !ok {
			return nil, expected("an array such as "+example, v)
		}
		for i, item := range items {
			t, err := parse(item)
			if err != nil {
				return nil, &itemError{i, err}
			}
			ts = append(ts, t)
		}
		return ts, nil
	}
}

// An itemError is about one item of an array.
type itemError struct {
	index int
	err   error
}

func (e *itemError) Error() string { return e.err.Error() }

func (e *itemError) Unwrap() error { return e.err }

// expectedWord returns the error for a value that is none of these words.
func expectedWord(words []string, got any) error {
	var quoted []string
	for _, w := range words {
		quoted = append(quoted, strconv.Quote(w))
	}
	err := expected(orList(quoted), got)
	s, ok := got.(string)
	if near := nearest(s, words); ok && near != "" {
		return fmt.Errorf("%w; did you mean %q?", err, near)
	}
	return err
}

// orList joins texts: "a, b or c".
func orList(texts []string) string {
	n := len(texts) - 1
	if n < 1 {
		return strings.Join(texts, "")
	}
	return strings.Join(texts[:n], ", ") + " or " + texts[n]
}

// literal shows a value as TOML writes it; for arrays and tables it only names the type.
func literal(v any) string {
	switch v := v.(type) {
	case nil:
		return "nothing"
	case string:
		return strconv.Quote(v)
	case []any, []map[string]any:
		return "an array"
	case map[string]any:
		return "a table"
	case time.Time:
		return "a date or time"
	}
	return fmt.Sprint(v)
}

func duration(shortest, longest time.Duration, limits string) func(any) (time.Duration, error) {
	return func(v any) (time.Duration, error) {
		s, _ := v.(string)
		d, err := time.ParseDuration(s)
		if err != nil || d < shortest || d > longest {
			return 0, expected("a duration "+limits, v)
		}
		return d, nil
	}
}

// link accepts the names that dev_valid_name in the kernel accepts.
func link(v any) (string, error) {
	s, _ := v.(string)
	if s == "" || s == "." || s == ".." || len(s) > 15 || strings.ContainsAny(s, "/: \t\n\v\f\r") {
		return "", expected(`the name of a link such as "wan0"`, v)
	}
	return s, nil
}

func peers(v any) (netip.Prefix, error) {
	return prefix(`a prefix such as "203.0.113.0/24" or "203.0.113.7/32"`, v)
}

func prefix(what string, v any) (netip.Prefix, error) {
	s, _ := v.(string)
	p, err := netip.ParsePrefix(s)
	if err != nil || p.Addr().Is4In6() {
		return netip.Prefix{}, expected(what, v)
	}
	if p != p.Masked() {
		return netip.Prefix{}, fmt.Errorf("%w; did you mean %q?", expected("a prefix without host bits", v), p.Masked())
	}
	return p, nil
}

// portPool accepts one range, an array of them, or "none".
func portPool(v any) (PortPool, error) {
	items, many := v.([]any)
	if !many {
		items = []any{v}
	}
	if len(items) == 1 && items[0] == string(NoPool) {
		return NoPool, nil
	}
	var ranges cone.PortRanges
	for i, item := range items {
		text, _ := item.(string)
		if n, ok := item.(int64); ok {
			text = strconv.FormatInt(n, 10)
		}
		for text := range strings.SplitSeq(text, ",") {
			r, ok := parsePorts(text)
			if !ok {
				err := expected(poolForm, item)
				if many {
					err = &itemError{i, err}
				}
				return "", err
			}
			ranges = append(ranges, r)
		}
	}
	if len(ranges) == 0 {
		return "", expected(poolForm, v)
	}
	return PortPool(ranges.Merged().Text()), nil
}

const poolForm = `ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none"`

// portList accepts an array of ports and ranges of ports.
func portList(v any) ([]uint16, error) {
	ranges, err := array(`[5060, "10000-20000"]`, portOrRange)(v)
	if err != nil {
		return nil, err
	}
	var all []uint16
	for _, r := range ranges {
		for p := int(r.First); p <= int(r.Last); p++ {
			all = append(all, uint16(p))
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

func portOrRange(v any) (cone.PortRange, error) {
	if n, _ := v.(int64); n >= 1 && n <= 65535 {
		return cone.PortRange{First: uint16(n), Last: uint16(n)}, nil
	}
	if r, ok := parseRange(v); ok {
		return r, nil
	}
	return cone.PortRange{}, expected(`a port between 1 and 65535 or a range such as "10000-20000"`, v)
}

// parsePorts reads one port, or two with a dash between them.
func parsePorts(text string) (cone.PortRange, bool) {
	r, ok := cone.ParsePortRange(text)
	return r, ok && r.First > 0
}

// parseRange reads two ports with a dash between them.
func parseRange(v any) (cone.PortRange, bool) {
	s, _ := v.(string)
	r, ok := parsePorts(s)
	return r, ok && strings.Contains(s, "-")
}

// number accepts a number from least to most.
func number(least, most int64, what string) func(any) (int, error) {
	return func(v any) (int, error) {
		n, ok := v.(int64)
		if !ok || n < least || n > most {
			return 0, expected(what, v)
		}
		return int(n), nil
	}
}

var (
	count       = number(0, 1<<30, "a number from 0 (no bound) to 1073741824")
	learnRate   = number(1, 100_000, "a number from 1 to 100000")
	eventBuffer = number(64<<10, 1<<30, "bytes between 65536 (64 KiB) and 1073741824 (1 GiB)")
)

// limit accepts what count accepts, and "auto".
func limit(v any) (int, error) {
	if v == "auto" {
		return Auto, nil
	}
	n, err := count(v)
	if err != nil {
		err = expected(`"auto" or a number from 0 (no bound) to 1073741824`, v)
	}
	return n, err
}

func boolean(v any) (bool, error) {
	b, ok := v.(bool)
	if !ok {
		return false, expected("true or false", v)
	}
	return b, nil
}

// table accepts names that nft accepts without quotes.
func table(v any) (string, error) {
	s, _ := v.(string)
	if !tableName.MatchString(s) {
		return "", expected(`the name of a table such as "conenat"`, v)
	}
	return s, nil
}

var tableName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]{0,31}$`)

// markBits accepts adjacent bits of a mark. A flag has them as text.
func markBits(v any) (uint32, error) {
	n, _ := v.(int64)
	if s, ok := v.(string); ok {
		n, _ = strconv.ParseInt(s, 0, 64)
	}
	m := uint32(n)
	if int64(m) != n || m == 0 || bits.OnesCount32(m) != bits.Len32(m)-bits.TrailingZeros32(m) {
		return 0, expected("bits of a mark side by side such as 0x0f000000", v)
	}
	return m, nil
}

// path accepts an absolute path of at most so many bytes, or "" for none.
func path(most int, what string) func(any) (string, error) {
	return func(v any) (string, error) {
		s, ok := v.(string)
		if !ok || s != "" && !filepath.IsAbs(s) || len(s) > most || strings.ContainsRune(s, 0) {
			return "", expected(what, v)
		}
		return s, nil
	}
}

var (
	socketPath   = path(107, `an absolute path of at most 107 bytes, or ""`)
	absolutePath = path(4095, `an absolute path, or ""`) // PATH_MAX
)

// listen accepts an address and a port, or "" for none. There is no short form such as
// ":9469", so that nobody listens for the whole network by mistake.
func listen(v any) (netip.AddrPort, error) {
	s, ok := v.(string)
	if ok && s == "" {
		return netip.AddrPort{}, nil
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.Port() == 0 || a.Addr().IsMulticast() {
		return netip.AddrPort{}, expected(`an address and a port such as "127.0.0.1:9469", or ""`, v)
	}
	return a, nil
}
