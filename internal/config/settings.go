package config

import (
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// A setting is one key of the file together with its flag. Only subnets are not settings.
type setting struct {
	key    string // in the file
	flag   string // the key with dashes, singular if it may be repeated
	kind   string // kind of value, for --help
	def    string // default, for --help
	usage  string // for --help
	list   bool   // the file has an array, the flag may be repeated
	number bool   // the file has integers, not strings
	truth  bool   // the file has booleans, not strings

	// set checks v, a value as TOML decodes it, and stores it in the Config.
	set func(c *Config, v any) error
}

// settings has every key except subnet, once. The fields of Config document the keys.
var settings = []setting{
	{
		key: "backend", flag: "backend", kind: "name", def: "auto",
		usage: "what carries permissions: auto (all that there is), expect or nft",
		set:   one(backend, func(c *Config) *Backend { return &c.Backend }),
	},
	{
		key: "lifetime", flag: "lifetime", kind: "duration", def: "5m",
		usage: "how long a permission stands after the inside host was last heard, 1s to 24h",
		set: one(duration(time.Second, 24*time.Hour, `between 1s and 24h such as "5m"`),
			func(c *Config) *time.Duration { return &c.Lifetime }),
	},
	{
		key: "reconcile", flag: "reconcile", kind: "duration", def: "30s",
		usage: "time between two comparisons with the kernel, 1s to 1h",
		set: one(duration(time.Second, time.Hour, `between 1s and 1h such as "30s"`),
			func(c *Config) *time.Duration { return &c.Reconcile }),
	},
	{
		key: "log_level", flag: "log-level", kind: "level", def: "info",
		usage: "least level that is logged: debug, info, warn or error",
		set:   one(level, func(c *Config) *slog.Level { return &c.LogLevel }),
	},
	{
		key: "outside", flag: "outside", kind: "link", list: true,
		usage: "outside link besides those that routes, rules and flows tell of (repeatable)",
		set:   list(`["wan0"]`, link, func(c *Config) *[]string { return &c.Outside }),
	},
	{
		key: "inside", flag: "inside", kind: "link", list: true,
		usage: "link that is no outside link, whatever routes and rules say (repeatable)",
		set:   list(`["lan0"]`, link, func(c *Config) *[]string { return &c.Inside }),
	},
	{
		key: "port_pool", flag: "port-pool", kind: "ports", def: "61000-65535", list: true,
		usage: "outside ports for hosts with endpoint-independent mapping whose own port another host has, or none (repeatable)",
		set:   one(portPool, func(c *Config) *PortPool { return &c.PortPool }),
	},
	{
		key: "mapping_exempt", flag: "mapping-exempt", kind: "prefix", list: true,
		usage: "destinations outside towards which your rules do not source-NAT, such as a VPN's (repeatable)",
		set:   list(`["192.0.2.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.MappingExempt }),
	},
	{
		key: "hairpin", flag: "hairpin", kind: "bool", def: "false", truth: true,
		usage: "let inside hosts reach each other by their outside endpoints (needs endpoint-independent mapping)",
		set:   one(truth, func(c *Config) *bool { return &c.Hairpin }),
	},
	{
		key: "uplink_marks", flag: "uplink-marks", kind: "bool", def: "false", truth: true,
		usage: "mark flows by the link of --outside that they leave or come by, for your rules of policy routing",
		set:   one(truth, func(c *Config) *bool { return &c.UplinkMarks }),
	},
	{
		key: "uplink_mask", flag: "uplink-mask", kind: "bits", def: "0x0f000000", number: true,
		usage: "bits of the marks that tell the link: 1 in them is the first of --outside, 2 the second",
		set:   one(markBits, func(c *Config) *uint32 { return &c.UplinkMask }),
	},
	{
		key: "heal_flows", flag: "heal-flows", kind: "bool", def: "false", truth: true,
		usage: "end UDP flows of enabled hosts that leave with a source that your rules would not give them now",
		set:   one(truth, func(c *Config) *bool { return &c.HealFlows }),
	},
	{
		key: "self", flag: "self", kind: "bool", def: "false", truth: true,
		usage: "let peers of the gateway's own programs answer from any port, too (not with --backend nft)",
		set:   one(truth, func(c *Config) *bool { return &c.Self }),
	},
	{
		key: "peer_groups", flag: "peer-group", kind: "prefix", list: true,
		usage: "peers of which a contact with one permits all, such as those of a SIP provider (repeatable)",
		set:   list(`["203.0.113.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.PeerGroups }),
	},
	{
		key: "exclude_peers", flag: "exclude-peer", kind: "prefix", list: true,
		usage: "peers that get no permission (repeatable)",
		set:   list(`["203.0.113.0/24"]`, peers, func(c *Config) *[]netip.Prefix { return &c.ExcludePeers }),
	},
	{
		key: "exclude_peer_ports", flag: "exclude-peer-port", kind: "port", def: "53,123,443", list: true, number: true,
		usage: `peer port, or range of them, towards which no permission arises, instead of the default (repeatable; "" for none)`,
		set:   ports(func(c *Config) *[]uint16 { return &c.ExcludePeerPorts }),
	},
	{
		key: "exclude_ports", flag: "exclude-port", kind: "port", list: true, number: true,
		usage: "outside port, or range such as 10000-20000, that never gets a permission because you forward it (repeatable)",
		set:   ports(func(c *Config) *[]uint16 { return &c.ExcludePorts }),
	},
	{
		key: "max_permissions", flag: "max-permissions", kind: "number", def: "0", number: true,
		usage: "permissions in all, 0 for no bound but the kernel's",
		set:   one(count, func(c *Config) *int { return &c.MaxPermissions }),
	},
	{
		key: "max_permissions_per_subnet", flag: "max-permissions-per-subnet", kind: "number", def: "0", number: true,
		usage: "permissions of one subnet, 0 for no bound",
		set:   one(count, func(c *Config) *int { return &c.MaxPermissionsPerSubnet }),
	},
	{
		key: "max_permissions_per_host", flag: "max-permissions-per-host", kind: "number", def: "auto", number: true,
		usage: "permissions of one inside address, 0 for no bound; auto: 4096, or half of nf_conntrack_max if that is less",
		set:   one(limit, func(c *Config) *int { return &c.MaxPermissionsPerHost }),
	},
	{
		key: "max_children", flag: "max-children", kind: "number", def: "auto", number: true,
		usage: "live flows that a peer may have by one permission, 0 for no bound; auto: 256, or 1/32 of nf_conntrack_max if that is less",
		set:   one(limit, func(c *Config) *int { return &c.MaxChildren }),
	},
	{
		key: "learn", flag: "learn", kind: "bool", def: "true", truth: true,
		usage: "let the kernel itself add a permission to the map while the first packet passes (not with backend expect)",
		set:   one(truth, func(c *Config) *bool { return &c.Learn }),
	},
	{
		key: "learn_rate", flag: "learn-rate", kind: "number", def: "200", number: true,
		usage: "permissions that the kernel learns from one inside address in a second, 1 to 100000",
		set:   one(learnRate, func(c *Config) *int { return &c.LearnRate }),
	},
	{
		key: "events", flag: "events", kind: "word", def: "auto",
		usage: "flows that the kernel reports: all, lean (not those whose permission it learned or that can have none), or auto (lean while it learns fast)",
		set:   one(events, func(c *Config) *Events { return &c.Events }),
	},
	{
		key: "guard", flag: "guard", kind: "bool", def: "true", truth: true,
		usage: "drop UDP packets from outside that no socket of the gateway waits for, or with the source of an inside host, before they become a flow",
		set:   one(truth, func(c *Config) *bool { return &c.Guard }),
	},
	{
		key: "table", flag: "table", kind: "name", def: "conenat",
		usage: "name of conenatd's own nftables table",
		set:   one(table, func(c *Config) *string { return &c.Table }),
	},
	{
		key: "on_stop", flag: "on-stop", kind: "word", def: "revoke",
		usage: "what a stop does with permissions: revoke, or keep for a new daemon to take over",
		set:   one(onStop, func(c *Config) *OnStop { return &c.OnStop }),
	},
	{
		key: "event_buffer", flag: "event-buffer", kind: "bytes", def: "8388608", number: true,
		usage: "receive buffer of the event socket, 65536 to 1073741824",
		set:   one(eventBuffer, func(c *Config) *int { return &c.EventBuffer }),
	},
	{
		key: "control_socket", flag: "control-socket", kind: "path",
		usage: "control socket (default: one per network namespace)",
		set:   one(socketPath, func(c *Config) *string { return &c.ControlSocket }),
	},
}

// one returns the setter for a key with a single value.
func one[T any](parse func(any) (T, error), field func(*Config) *T) func(*Config, any) error {
	return func(c *Config, v any) error {
		t, err := parse(v)
		if err == nil {
			*field(c) = t
		}
		return err
	}
}

// list returns the setter for a key with an array of values. The array replaces the
// default.
func list[T any](example string, parse func(any) (T, error), field func(*Config) *[]T) func(*Config, any) error {
	return func(c *Config, v any) error {
		items, ok := v.([]any)
		if !ok {
			return expected("an array such as "+example, v)
		}
		var ts []T
		for _, item := range items {
			t, err := parse(item)
			if err != nil {
				return err
			}
			ts = append(ts, t)
		}
		*field(c) = ts
		return nil
	}
}

// expected returns the error for a value that differs from what was expected.
func expected(what string, got any) error {
	return fmt.Errorf("expected %s, got %s", what, literal(got))
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

func backend(v any) (Backend, error) {
	switch v {
	case "auto", "expect", "nft":
		return Backend(v.(string)), nil
	}
	return "", expected(`"auto", "expect" or "nft"`, v)
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

func level(v any) (slog.Level, error) {
	switch v {
	case "debug":
		return slog.LevelDebug, nil
	case "info":
		return slog.LevelInfo, nil
	case "warn":
		return slog.LevelWarn, nil
	case "error":
		return slog.LevelError, nil
	}
	return 0, expected(`"debug", "info", "warn" or "error"`, v)
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

func filtering(v any) (Filtering, error) {
	for _, f := range []Filtering{AddressDependent, EndpointIndependent, AddressAndPortDependent} {
		if v == f.String() {
			return f, nil
		}
	}
	return "", expected(`"address_dependent", "endpoint_independent" or "address_and_port_dependent"`, v)
}

func mapping(v any) (Mapping, error) {
	for _, m := range []Mapping{KernelMapping, EndpointIndependentMapping} {
		if v == m.String() {
			return m, nil
		}
	}
	return "", expected(`"kernel" or "endpoint_independent"`, v)
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
	var ranges []PortRange
	for _, item := range items {
		text, _ := item.(string)
		if n, ok := item.(int64); ok {
			text = strconv.FormatInt(n, 10)
		}
		for text := range strings.SplitSeq(text, ",") {
			r, ok := parsePorts(text)
			if !ok {
				return "", expected(poolForm, item)
			}
			ranges = append(ranges, r)
		}
	}
	if len(ranges) == 0 {
		return "", expected(poolForm, v)
	}
	return poolOf(ranges), nil
}

const poolForm = `ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none"`

// ports returns the setter for a key with an array of ports and ranges of ports.
func ports(field func(*Config) *[]uint16) func(*Config, any) error {
	return func(c *Config, v any) error {
		var ranges []PortRange
		err := list(`[5060, "10000-20000"]`, portOrRange, func(*Config) *[]PortRange { return &ranges })(c, v)
		if err != nil {
			return err
		}
		var all []uint16
		for _, r := range ranges {
			for p := int(r.First); p <= int(r.Last); p++ {
				all = append(all, uint16(p))
			}
		}
		slices.Sort(all)
		*field(c) = slices.Compact(all)
		return nil
	}
}

func portOrRange(v any) (PortRange, error) {
	if n, _ := v.(int64); n >= 1 && n <= 65535 {
		return PortRange{uint16(n), uint16(n)}, nil
	}
	if r, ok := parseRange(v); ok {
		return r, nil
	}
	return PortRange{}, expected(`a port between 1 and 65535 or a range such as "10000-20000"`, v)
}

// parsePorts reads one port, or two with a dash between them.
func parsePorts(text string) (r PortRange, ok bool) {
	if !strings.Contains(text, "-") {
		text += "-" + text
	}
	return parseRange(text)
}

// parseRange reads two ports with a dash between them.
func parseRange(v any) (r PortRange, ok bool) {
	s, _ := v.(string)
	first, last, _ := strings.Cut(s, "-")
	a, err := strconv.ParseUint(first, 10, 16)
	b, err2 := strconv.ParseUint(last, 10, 16)
	return PortRange{uint16(a), uint16(b)}, err == nil && err2 == nil && a >= 1 && a <= b
}

func count(v any) (int, error) {
	n, ok := v.(int64)
	if !ok || n < 0 || n > 1<<30 {
		return 0, expected("a number from 0 (no bound) to 1073741824", v)
	}
	return int(n), nil
}

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

func learnRate(v any) (int, error) {
	n, _ := v.(int64)
	if n < 1 || n > 100_000 {
		return 0, expected("a number from 1 to 100000", v)
	}
	return int(n), nil
}

func truth(v any) (bool, error) {
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

func events(v any) (Events, error) {
	switch v {
	case "auto", "all", "lean":
		return Events(v.(string)), nil
	}
	return "", expected(`"auto", "all" or "lean"`, v)
}

func onStop(v any) (OnStop, error) {
	switch v {
	case "revoke", "keep":
		return OnStop(v.(string)), nil
	}
	return "", expected(`"revoke" or "keep"`, v)
}

func eventBuffer(v any) (int, error) {
	n, _ := v.(int64)
	if n < 64<<10 || n > 1<<30 {
		return 0, expected("bytes between 65536 (64 KiB) and 1073741824 (1 GiB)", v)
	}
	return int(n), nil
}

func socketPath(v any) (string, error) {
	s, ok := v.(string)
	if !ok || len(s) > 107 || s != "" && !filepath.IsAbs(s) {
		return "", expected(`an absolute path of at most 107 bytes, or ""`, v)
	}
	return s, nil
}
