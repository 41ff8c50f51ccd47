package config

import (
	"reflect"
	"strings"
	"testing"
)

func TestWrongFilesSayWhereAndWhatWasExpected(t *testing.T) {
	for name, tt := range map[string]struct {
		data string
		want string // each line without its leading "f.toml:"
	}{
		"backend that does not exist":  {`backend = "ebpf"`, `1:11: backend: expected "auto", "expect" or "nft", got "ebpf"`},
		"backend of another type":      {`backend = ["nft"]`, `1:11: backend: expected "auto", "expect" or "nft", got an array`},
		"events of another kind":       {`events = "some"`, `1:10: events: expected "auto", "all" or "lean", got "some"`},
		"learn rate of nothing":        {`learn_rate = 0`, `1:14: learn_rate: expected a number from 1 to 100000, got 0`},
		"learn rate beyond all":        {`learn_rate = 100001`, `1:14: learn_rate: expected a number from 1 to 100000, got 100001`},
		"duration in words":            {"\n\nlifetime = \"5 minutes\"", `3:12: lifetime: expected a duration between 1s and 24h such as "5m", got "5 minutes"`},
		"duration without unit":        {`lifetime = 300`, `1:12: lifetime: expected a duration between 1s and 24h such as "5m", got 300`},
		"duration too short":           {`lifetime = "999ms"`, `1:12: lifetime: expected a duration between 1s and 24h such as "5m", got "999ms"`},
		"duration too long":            {`reconcile = "61m"`, `1:13: reconcile: expected a duration between 1s and 1h such as "30s", got "61m"`},
		"negative duration":            {`reconcile = "-30s"`, `1:13: reconcile: expected a duration between 1s and 1h such as "30s", got "-30s"`},
		"log level in capitals":        {`log_level = "INFO"`, `1:13: log_level: expected "debug", "info", "warn" or "error", got "INFO"; did you mean "info"?`},
		"string where an array stands": {`outside = "wan0"`, `1:11: outside: expected an array such as ["wan0"], got "wan0"`},
		"number among strings":         {`outside = ["wan0", 1]`, `1:20: outside: expected the name of a link such as "wan0", got 1`},
		"name too long for a link":     {`outside = ["a23456789-123456"]`, `1:12: outside: expected the name of a link such as "wan0", got "a23456789-123456"`},
		"address where a prefix is":    {`exclude_peers = ["203.0.113.7"]`, `1:18: exclude_peers: expected a prefix such as "203.0.113.0/24" or "203.0.113.7/32", got "203.0.113.7"`},
		"IPv4-mapped prefix":           {`exclude_peers = ["::ffff:192.0.2.0/120"]`, `1:18: exclude_peers: expected a prefix such as "203.0.113.0/24" or "203.0.113.7/32", got "::ffff:192.0.2.0/120"`},
		"peers with host bits":         {`exclude_peers = ["203.0.113.7/24"]`, `1:18: exclude_peers: expected a prefix without host bits, got "203.0.113.7/24"; did you mean "203.0.113.0/24"?`},
		"port zero":                    {`exclude_ports = [0]`, `1:18: exclude_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got 0`},
		"port out of range":            {`exclude_peer_ports = [53, 65536]`, `1:27: exclude_peer_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got 65536`},
		"range from port zero":         {`exclude_ports = ["0-9"]`, `1:18: exclude_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got "0-9"`},
		"range backwards":              {`exclude_peer_ports = ["9-8"]`, `1:23: exclude_peer_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got "9-8"`},
		"port as a string":             {`exclude_ports = ["5060"]`, `1:18: exclude_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got "5060"`},
		"one port without brackets":    {`exclude_ports = 5060`, `1:17: exclude_ports: expected an array such as [5060, "10000-20000"], got 5060`},
		"limit in words":               {`max_children = "many"`, `1:16: max_children: expected "auto" or a number from 0 (no bound) to 1073741824, got "many"`},
		"negative limit":               {`max_permissions_per_host = -1`, `1:28: max_permissions_per_host: expected "auto" or a number from 0 (no bound) to 1073741824, got -1`},
		"limit that is not automatic":  {`max_permissions = "auto"`, `1:19: max_permissions: expected a number from 0 (no bound) to 1073741824, got "auto"`},
		"buffer too small":             {`event_buffer = 4096`, `1:16: event_buffer: expected bytes between 65536 (64 KiB) and 1073741824 (1 GiB), got 4096`},
		"buffer as a float":            {`event_buffer = 1e6`, `1:16: event_buffer: expected bytes between 65536 (64 KiB) and 1073741824 (1 GiB), got 1e+06`},
		"socket with a zero byte":      {`control_socket = "/run/\u0000"`, `1:18: control_socket: expected an absolute path of at most 107 bytes, or "", got "/run/\x00"`},
		"relative socket":              {`control_socket = "c.sock"`, `1:18: control_socket: expected an absolute path of at most 107 bytes, or "", got "c.sock"`},
		"metrics on every address":     {`metrics_listen = ":9469"`, `1:18: metrics_listen: expected an address and a port such as "127.0.0.1:9469", or "", got ":9469"`},
		"metrics without a port":       {`metrics_listen = "127.0.0.1"`, `1:18: metrics_listen: expected an address and a port such as "127.0.0.1:9469", or "", got "127.0.0.1"`},
		"metrics by a name":            {`metrics_listen = "localhost:9469"`, `1:18: metrics_listen: expected an address and a port such as "127.0.0.1:9469", or "", got "localhost:9469"`},
		"metrics on port 0":            {`metrics_listen = "127.0.0.1:0"`, `1:18: metrics_listen: expected an address and a port such as "127.0.0.1:9469", or "", got "127.0.0.1:0"`},
		"socket that is a date":        {`control_socket = 2006-01-02`, `1:18: control_socket: expected an absolute path of at most 107 bytes, or "", got a date or time`},

		"unknown key": {
			"# typo\nlifetme = \"5m\"",
			`2:1: lifetme: unknown key; did you mean lifetime?`,
		},
		"unknown table": {
			"lifetime = \"5m\"\n[limits.host]\nx = 1",
			`2:1: limits: unknown table; the only one is [[subnet]]`,
		},
		"unknown key like no other": {
			`mtu = 1500`,
			`1:1: mtu: unknown key, expected one of ` + strings.Join(topKeys(), ", "),
		},
		"two letters of a key swapped": {
			"\n  recnocile = \"30s\"",
			`2:3: recnocile: unknown key; did you mean reconcile?`,
		},
		"a flag where its key stands": {
			"exclude-port = [1]",
			`1:1: exclude-port: unknown key; did you mean exclude_ports?`,
		},
		"a table with a slip": {
			"[[subnets]]\nprefix = \"10.0.0.0/8\"",
			`1:1: subnets: unknown key; did you mean [[subnet]]?`,
		},
		"an audit log without a folder": {
			`audit_log = "audit.log"`,
			`1:13: audit_log: expected an absolute path, or "", got "audit.log"`,
		},
		"a log format with a slip": {
			`log_format = "journald"`,
			`1:14: log_format: expected "auto", "text", "json" or "journal", got "journald"; did you mean "journal"?`,
		},
		"a key of a subnet at the top": {
			"filtering = \"address_dependent\"",
			`1:1: filtering: unknown key; filtering stands in a table that begins with [[subnet]]`,
		},
		"a key of a subnet with a slip": {
			"[[subnet]]\nprefx = \"10.0.0.0/8\"",
			`1:1: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got nothing
2:1: subnet.prefx: unknown key of a subnet; did you mean prefix?`,
		},
		"a word with a slip": {
			`backend = "exepct"`,
			`1:11: backend: expected "auto", "expect" or "nft", got "exepct"; did you mean "expect"?`,
		},
		"a word of a subnet with dashes": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nmapping = \"endpoint-independent\"",
			`3:11: subnet.mapping: expected "kernel" or "endpoint_independent", got "endpoint-independent"; did you mean "endpoint_independent"?`,
		},
		"a character of two bytes before the value": {
			"subnet = [{\"\u00e9\" = 1, prefix = 2}]",
			`1:12: subnet."é": unknown key of a subnet, expected prefix, routed, filtering, mapping or port_pool
1:30: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got 2`,
		},
		"a key twice in a subnet": {
			"[[subnet]]\nrouted = true\n[[subnet]]\n\nrouted = true\n  routed = false",
			`6:3: subnet.routed: expected once in a subnet, but line 5 has it, too; keep one of the two`,
		},
		"key of another case": {
			`Lifetime = "5m"`,
			`1:1: Lifetime: unknown key; did you mean lifetime?`,
		},
		"unknown key in the second subnet": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\n[[subnet]]\nprefix = \"192.168.0.0/16\"\nmtu = 1500",
			`5:1: subnet.mtu: unknown key of a subnet, expected prefix, routed, filtering, mapping or port_pool`,
		},
		"key of the top below a subnet": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\n\nlifetime = \"5m\"",
			`4:1: subnet.lifetime: unknown key of a subnet; lifetime stands above the first [[subnet]]`,
		},
		"table in a subnet": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\n[subnet.limits]\nx = 1",
			`3:1: subnet.limits: unknown key of a subnet, expected prefix, routed, filtering, mapping or port_pool`,
		},
		"wrong type in the second subnet": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nrouted = true\n[[subnet]]\nprefix = \"192.168.0.0/16\"\nrouted = \"yes\"",
			`6:10: subnet.routed: expected true or false, got "yes"`,
		},
		"subnet without a prefix": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\n\n[[subnet]]\nrouted = true",
			`4:1: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got nothing`,
		},
		"subnet that is no prefix": {
			"[[subnet]]\nprefix = \"10.0.0\"",
			`2:10: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got "10.0.0"`,
		},
		"subnet that can be no link": {
			"[[subnet]]\nprefix = \"2001:db8::\"",
			`2:10: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got "2001:db8::"`,
		},
		"link twice": {
			"[[subnet]]\nprefix = \"lan0\"\n[[subnet]]\nprefix = \"lan0\"\nrouted = true",
			`4:10: subnet.prefix: expected each link once, got "lan0"; keep one of the two`,
		},
		"routed link with filtering": {
			"[[subnet]]\nprefix = \"lan0\"\nrouted = true\nfiltering = \"endpoint_independent\"",
			`4:13: subnet.filtering: "lan0" is routed, and endpoint_independent filtering is for source NAT: an expectation for everybody would let other inside networks in`,
		},
		"link inside and outside": {
			"outside = [\"wan0\", \"lan0\"]\ninside = [\"lan0\"]",
			`2:10: inside: link "lan0" is one of outside, too: a link is one or the other, so take it out of one of the two`,
		},
		"subnet with host bits": {
			"[[subnet]]\nprefix = \"192.168.1.1/24\"",
			`2:10: subnet.prefix: expected a prefix without host bits, got "192.168.1.1/24"; did you mean "192.168.1.0/24"?`,
		},
		"IPv6 subnet with host bits": {
			"[[subnet]]\nprefix = \"2001:db8::1/64\"",
			`2:10: subnet.prefix: expected a prefix without host bits, got "2001:db8::1/64"; did you mean "2001:db8::/64"?`,
		},
		"filtering": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nfiltering = \"full_cone\"",
			`3:13: subnet.filtering: expected "address_dependent", "endpoint_independent" or "address_and_port_dependent", got "full_cone"`,
		},
		"filtering auto": {
			"[[subnet]]\nprefix = \"auto\"\nfiltering = \"endpoint_independent\"",
			`2:10: subnet.prefix: expected a prefix beside filtering: which networks it is for should not be guessed, got "auto"`,
		},
		"mapping": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nmapping = \"full_cone\"",
			`3:11: subnet.mapping: expected "kernel" or "endpoint_independent", got "full_cone"`,
		},
		"mapping of IPv6": {
			"[[subnet]]\nprefix = \"2001:db8::/64\"\nmapping = \"endpoint_independent\"",
			`2:10: subnet.prefix: expected an IPv4 prefix beside mapping, got "2001:db8::/64"; mapping is about IPv4 addresses that are translated`,
		},
		"self without expectations": {
			"backend = \"nft\"\nself = true",
			`2:8: self: only expectations carry permissions of the gateway's own programs, and backend "nft" has none: set backend = "auto" or "expect"`,
		},
		"hairpin without mapping": {
			"hairpin = true\n[[subnet]]\nprefix = \"10.0.0.0/8\"",
			`1:11: hairpin: expected a subnet with mapping = "endpoint_independent": hosts are found by their mappings`,
		},
		"marks without uplinks": {
			"uplink_marks = true",
			`1:16: uplink_marks: expected the uplinks in outside, such as ["wan0", "wan1"]: the mark of each is its place there`,
		},
		"a mark twice": {
			"outside = [\"wan0\", \"wan1\", \"wan0\"]\nuplink_marks = true",
			`1:11: outside: link "wan0" is there twice: its place is its mark, so take one of them out`,
		},
		"marks for fewer uplinks": {
			"outside = [\"wan0\", \"wan1\"]\nuplink_marks = true\nuplink_mask = 0x100",
			`3:15: uplink_mask: 0x00000100 has room for 1 uplinks, and outside has 2: give it more bits`,
		},
		"a mask with a hole": {
			"uplink_mask = 0x101",
			`1:15: uplink_mask: expected bits of a mark side by side such as 0x0f000000, got 257`,
		},
		"a mask without bits": {
			"uplink_mask = 0",
			`1:15: uplink_mask: expected bits of a mark side by side such as 0x0f000000, got 0`,
		},
		"a mask that is too wide": {
			"uplink_mask = 0xf00000000",
			`1:15: uplink_mask: expected bits of a mark side by side such as 0x0f000000, got 64424509440`,
		},
		"a pool that ends before it begins": {
			"port_pool = [\"7472-7487\", \"61001-61000\"]",
			`1:27: port_pool: expected ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none", got "61001-61000"`,
		},
		"an empty pool": {
			"port_pool = []",
			`1:13: port_pool: expected ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none", got an array`,
		},
		"a pool and none": {
			"port_pool = [\"7472-7487\", \"none\"]",
			`1:27: port_pool: expected ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none", got "none"`,
		},
		"a pool without quotes": {
			"port_pool = 61000-65535",
			`1:13: port_pool: expected ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none", got 61000-65535 (not valid TOML: invalid datetime: "61000-65535")`,
		},
		"a pool with port 0": {
			"port_pool = \"0-15\"",
			`1:13: port_pool: expected ports such as "61000-65535" or ["7472-7487", "11568-11583"], or "none", got "0-15"`,
		},
		"a pool of a subnet without mapping": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nport_pool = \"none\"",
			`3:13: subnet.port_pool: "10.0.0.0/8" has a port_pool, which is for mapping = "endpoint_independent": add that, or take the port_pool out`,
		},
		"a pool of subnets that are found": {
			"[[subnet]]\nprefix = \"auto\"\nport_pool = \"none\"",
			`2:10: subnet.prefix: expected a prefix beside port_pool: which networks it is for should not be guessed, got "auto"`,
		},
		"an open subnet that is routed": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\nrouted = true\nfiltering = \"endpoint_independent\"",
			`4:13: subnet.filtering: "10.0.0.0/8" is routed, and endpoint_independent filtering is for source NAT: an expectation for everybody would let other inside networks in`,
		},
		"a group inside": {
			"peer_groups = [\"10.1.0.0/16\"]\n[[subnet]]\nprefix = \"10.0.0.0/8\"",
			`1:15: peer_groups: "10.1.0.0/16" overlaps subnet "10.0.0.0/8", whose hosts are inside: name peers`,
		},
		"groups that overlap": {
			"peer_groups = [\"203.0.113.0/24\", \"203.0.113.64/26\"]",
			`1:15: peer_groups: "203.0.113.64/26" overlaps "203.0.113.0/24"; a peer belongs to one group, so keep one of the two`,
		},
		"a group with an excluded peer": {
			"exclude_peers = [\"203.0.113.7/32\"]\npeer_groups = [\"203.0.113.0/24\"]",
			`2:15: peer_groups: "203.0.113.0/24" overlaps "203.0.113.7/32" of exclude_peers, whose addresses would be permitted with the group; keep one of the two`,
		},
		"open auto": {
			"[[subnet]]\nprefix = \"auto\"\nfiltering = \"endpoint_independent\"",
			`2:10: subnet.prefix: expected a prefix beside filtering: which networks it is for should not be guessed, got "auto"`,
		},
		"one bracket": {
			"\n[subnet]\nprefix = \"10.0.0.0/8\"",
			`2:1: subnet: expected tables that begin with [[subnet]], got a table`,
		},
		"prefixes instead of tables": {
			`subnet = ["10.0.0.0/8"]`,
			`1:10: subnet: expected tables that begin with [[subnet]], got an array`,
		},
		"inline subnets in which the second is wrong": {
			"\nsubnet = [\n {prefix = \"10.0.0.0/8\"},\n {prefix = 1},\n]",
			`4:12: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got 1`,
		},
		"the same subnet twice": {
			"[[subnet]]\nprefix = \"10.0.0.0/8\"\n[[subnet]]\nprefix = \"10.0.0.0/8\"",
			`4:10: subnet.prefix: expected subnets that do not overlap, got "10.0.0.0/8" equal to "10.0.0.0/8" of f.toml:2; a host belongs to one subnet, so keep one of the two`,
		},
		"a subnet inside an earlier one": {
			"[[subnet]]\nprefix = \"192.168.0.0/16\"\n[[subnet]]\nprefix = \"192.168.1.0/24\"",
			`4:10: subnet.prefix: expected subnets that do not overlap, got "192.168.1.0/24" inside "192.168.0.0/16" of f.toml:2; a host belongs to one subnet, so keep one of the two`,
		},
		"a subnet around an earlier one": {
			"[[subnet]]\nprefix = \"2001:db8:0:1::/64\"\n[[subnet]]\nrouted = true\nprefix = \"2001:db8::/32\"",
			`5:10: subnet.prefix: expected subnets that do not overlap, got "2001:db8::/32" around "2001:db8:0:1::/64" of f.toml:2; a host belongs to one subnet, so keep one of the two`,
		},

		"the line after an array and a string of several lines": {
			"outside = [\n \"wan0\", # = [\n]\ncontrol_socket = '''\n/run/\nlifetime = 1'''\nlifetime = 1",
			`7:12: lifetime: expected a duration between 1s and 24h such as "5m", got 1`,
		},
		"an item of an array of several lines is named by its own": {
			"exclude_ports = [\n 1,\n 0,\n]",
			`3:2: exclude_ports: expected a port between 1 and 65535 or a range such as "10000-20000", got 0`,
		},
		"all errors, in the order of the file": {
			"reconcile = 1\nbackend = 2\n[[subnet]]\nrouted = 3\nprefix = 4\n[[subnet]]\nprefix = 5",
			`1:13: reconcile: expected a duration between 1s and 1h such as "30s", got 1
2:11: backend: expected "auto", "expect" or "nft", got 2
4:10: subnet.routed: expected true or false, got 3
5:10: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got 4
7:10: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got 5`,
		},

		"a duration without quotes": {
			"\nlifetime = 5m # five",
			`2:13: lifetime: expected a duration between 1s and 24h such as "5m", got 5m # five (not valid TOML: expected a top-level item to end with a newline, comment, or EOF, but got 'm' instead)`,
		},
		"a word without quotes": {
			"log_level = info",
			`1:16: log_level: expected "debug", "info", "warn" or "error", got info (not valid TOML: expected a top-level item to end with a newline, comment, or EOF, but got 'o' instead)`,
		},
		"a prefix without quotes": {
			"[[subnet]]\nprefix = 192.168.1.0/24",
			`2:10: subnet.prefix: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got 192.168.1.0/24 (not valid TOML: Invalid float value: "192.168.1.0")`,
		},
		"a capital in a boolean": {
			"[[subnet]]\nrouted = True",
			`2:10: subnet.routed: expected true or false, got True (not valid TOML: expected value but found "True" instead)`,
		},
		"lines of an old Mac":           {"lifetime = \"5m\"\r[[subnet]]\r", `1:15: not valid TOML: TOML files cannot contain control characters: '0x0d'`},
		"a zero byte":                   {"lifetime = \"5m\"\x00\n", `1:15: not valid TOML: TOML files cannot contain control characters: '0x00'`},
		"a byte of another charset":     {"lifetime = \"5m\xff\"\n", `1:13: lifetime: not valid TOML: invalid UTF-8 byte: 0xff`},
		"an unknown key without quotes": {"\nmtu = auto", `2:7: mtu: not valid TOML: expected value but found "auto" instead`},
		"a string without an end":       {"lifetime = \"5m\"\nlog_level = \"info\nreconcile = 1", `2:18: log_level: expected "debug", "info", "warn" or "error", got "info (not valid TOML: strings cannot contain newlines)`},
		"an array without an end":       {"outside = [\"wan0\"\nlifetime = \"5m\"", `2:16: outside: not valid TOML: expected a comma (',') or array terminator (']'), but got 'l'`},
		"a key twice":                   {"lifetime = \"5m\"\nlifetime = \"5m\"", `2:1: lifetime: expected once in the file, but line 1 has it, too; keep one of the two`},
		"a key with a line break":       {"\"a\\n\" = ", "1:8: a\uFFFD: not valid TOML: unexpected EOF; expected value"},
		"a header without its end":      {"\n[[subnet]\nprefix = \"10.0.0.0/24\"", `2:11: not valid TOML: expected end of table array name delimiter ']', but got '\n' instead`},
		"no equals sign":                {"lifetime", `1:8: not valid TOML: unexpected EOF; expected key separator '='`},
		"UTF-16":                        {"l\x00i\x00", `1:1: not valid TOML: files cannot contain NULL bytes; probably using UTF-16; TOML files must be UTF-8`},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := whole("f.toml", tt.data)
			if err == nil {
				t.Fatalf("accepted as %+v", c)
			}
			want := "f.toml:" + strings.ReplaceAll(tt.want, "\n", "\nf.toml:")
			if err.Error() != want {
				t.Errorf("\ngot  %s\nwant %s", err, want)
			}
			if !IsUsage(err) {
				t.Errorf("not a UsageError: %v", err)
			}
			if !reflect.DeepEqual(c, Config{}) {
				t.Errorf("a Config came back with the error: %+v", c)
			}
		})
	}
}

func TestSubnetsMustBeUnicast(t *testing.T) {
	for prefix, overlap := range map[string]string{
		"0.0.0.0/0":          `"0.0.0.0/8" (this network, RFC 1122)`,
		"127.0.0.0/8":        `"127.0.0.0/8" (loopback, RFC 1122)`,
		"127.1.0.0/16":       `"127.0.0.0/8" (loopback, RFC 1122)`,
		"169.254.0.0/16":     `"169.254.0.0/16" (link-local, RFC 3927)`,
		"239.1.0.0/16":       `"224.0.0.0/4" (multicast, RFC 5771)`,
		"255.255.255.255/32": `"255.255.255.255/32" (broadcast, RFC 919)`,
		"::/0":               `"::/128" (unspecified, RFC 4291)`,
		"::1/128":            `"::1/128" (loopback, RFC 4291)`,
		"fe80::/64":          `"fe80::/10" (link-local, RFC 4291)`,
		"ff02::/16":          `"ff00::/8" (multicast, RFC 4291)`,
	} {
		t.Run(prefix, func(t *testing.T) {
			_, err := whole("f.toml", "[[subnet]]\nprefix = \""+prefix+"\"")
			want := `f.toml:2:10: subnet.prefix: expected a unicast prefix, got "` + prefix + `", which overlaps ` + overlap
			if err == nil || err.Error() != want {
				t.Errorf("\ngot  %v\nwant %s", err, want)
			}
		})
	}
}
