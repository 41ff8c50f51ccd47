package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// Literal returns a value of a field of Config or Subnet as TOML. It panics if no field has
// the type of v.
func Literal(v any) string {
	switch v := v.(type) {
	case bool:
		return strconv.FormatBool(v)
	case int:
		if v == Auto {
			return `"auto"`
		}
		return strconv.Itoa(v)
	case uint32:
		return fmt.Sprintf("%#08x", v)
	case time.Duration:
		return quote(shortDuration(v))
	case slog.Level:
		return quote(strings.ToLower(v.String()))
	case []uint16:
		return joined(PortRanges(v), func(r cone.PortRange) string {
			if r.First == r.Last {
				return r.Text()
			}
			return quote(r.Text())
		})
	case []string:
		return joined(v, quote)
	case []netip.Prefix:
		return joined(v, func(p netip.Prefix) string { return quote(p.String()) })
	case interface {
		IsValid() bool
		fmt.Stringer
	}: // netip.AddrPort, netip.Prefix
		if !v.IsValid() {
			return quote("")
		}
		return quote(v.String())
	case string:
		return quote(v)
	case Backend, Events, LogFormat, OnStop, Page, Filtering, Mapping, PortPool:
		return quote(fmt.Sprint(v))
	}
	panic(fmt.Sprintf("no TOML for a %T", v))
}

func joined[T any](items []T, text func(T) string) string {
	var texts []string
	for _, t := range items {
		texts = append(texts, text(t))
	}
	return "[" + strings.Join(texts, ", ") + "]"
}

// quote returns a TOML string. The strings of a Config have no control characters, except
// for paths; those that TOML cannot escape as Go does are escaped by number.
func quote(s string) string {
	var b strings.Builder
	b.WriteByte('"')
	for _, r := range s {
		switch {
		case r == '"' || r == '\\':
			b.WriteByte('\\')
			b.WriteRune(r)
		case r < ' ' || r == 0x7f:
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	b.WriteByte('"')
	return b.String()
}

// shortDuration is d without units that are 0: "5m" and not "5m0s".
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// PortRanges returns sorted ports as ranges; fewer than three ports are no range.
func PortRanges(ports []uint16) (all cone.PortRanges) {
	for i := 0; i < len(ports); {
		j := i + 1
		for j < len(ports) && ports[j] == ports[j-1]+1 {
			j++
		}
		if j-i > 2 {
			all = append(all, cone.PortRange{First: ports[i], Last: ports[j-1]})
			i = j
			continue
		}
		all = append(all, cone.PortRange{First: ports[i], Last: ports[i]})
		i++
	}
	return all
}
