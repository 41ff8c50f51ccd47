package config

import (
	"log/slog"
	"net/netip"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// every is a file in which no key has its default.
const every = `
backend = "expect"
lifetime = "90s"
reconcile = "1m"
log_level = "debug"
log_format = "json"
audit_log = "/var/log/a"
audit_peers = true
outside = ["wan0", "ppp0"]
inside = ["lan0"]
port_pool = ["30016-30031", "20000-29999"]
mapping_exempt = ["192.0.2.0/24"]
hairpin = true
uplink_marks = true
uplink_mask = 0xff00
heal_flows = true
self = true
peer_groups = ["198.51.100.0/28", "2001:db9::/64"]
exclude_peers = ["203.0.113.0/24", "2001:db8::/32"]
exclude_peer_ports = [53]
exclude_ports = [5060, 65535]
max_permissions = 1000
max_permissions_per_subnet = 500
max_permissions_per_host = 50
max_children = 10
learn = false
learn_rate = 7
events = "all"
quiet = true
guard = false
table = "cone2"
on_stop = "keep"
event_buffer = 65_536
control_socket = "/run/c.sock"
metrics_listen = "127.0.0.1:9469"
page = "everywhere"

[[subnet]]
prefix = "192.168.1.0/24"
mapping = "endpoint_independent"

[[subnet]]
prefix = "2001:db8:1::/64"
routed = true
filtering = "address_and_port_dependent"

[[subnet]]
prefix = "lan0"
mapping = "endpoint_independent"
port_pool = "none"

[[subnet]]
prefix = "auto"
routed = true
`

func everyConfig() Config {
	return Config{
		Backend:          BackendExpect,
		Lifetime:         90 * time.Second,
		Reconcile:        time.Minute,
		LogLevel:         slog.LevelDebug,
		LogFormat:        JSONLog,
		AuditLog:         "/var/log/a",
		AuditPeers:       true,
		Outside:          []string{"wan0", "ppp0"},
		Inside:           []string{"lan0"},
		PortPool:         "20000-29999,30016-30031",
		MappingExempt:    []netip.Prefix{netip.MustParsePrefix("192.0.2.0/24")},
		Hairpin:          true,
		UplinkMarks:      true,
		UplinkMask:       0xff00,
		HealFlows:        true,
		Self:             true,
		PeerGroups:       []netip.Prefix{netip.MustParsePrefix("198.51.100.0/28"), netip.MustParsePrefix("2001:db9::/64")},
		ExcludePeers:     []netip.Prefix{netip.MustParsePrefix("203.0.113.0/24"), netip.MustParsePrefix("2001:db8::/32")},
		ExcludePeerPorts: []uint16{53},
		ExcludePorts:     []uint16{5060, 65535},

		MaxPermissions:          1000,
		MaxPermissionsPerSubnet: 500,
		MaxPermissionsPerHost:   50,
		MaxChildren:             10,
		LearnRate:               7,
		Events:                  AllEvents, Quiet: true,

		Table:         "cone2",
		OnStop:        OnStopKeep,
		EventBuffer:   64 << 10,
		ControlSocket: "/run/c.sock",
		MetricsListen: netip.MustParseAddrPort("127.0.0.1:9469"),
		Page:          PageEverywhere,
		AutoSubnets:   true,
		AutoRouted:    true,
		Subnets: []Subnet{
			{Prefix: netip.MustParsePrefix("192.168.1.0/24"), Mapping: EndpointIndependentMapping},
			{Prefix: netip.MustParsePrefix("2001:db8:1::/64"), Routed: true, Filtering: AddressAndPortDependent},
		},
		LinkSubnets: []LinkSubnet{{Link: "lan0", Like: Subnet{Mapping: EndpointIndependentMapping, PortPool: NoPool}}},
	}
}

func TestEveryFieldIsReadFromTheFile(t *testing.T) {
	got, err := whole("f.toml", every)
	if err != nil {
		t.Fatal(err)
	}
	if want := everyConfig(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	// A field that no key sets would still have its default.
	g, d := reflect.ValueOf(got), reflect.ValueOf(Default())
	for i := range g.NumField() {
		if reflect.DeepEqual(g.Field(i).Interface(), d.Field(i).Interface()) {
			t.Errorf("no key in the test sets Config.%s", g.Type().Field(i).Name)
		}
	}
}

func TestAcceptedFiles(t *testing.T) {
	subnets := func(prefixes ...string) (list []Subnet) {
		for _, p := range prefixes {
			list = append(list, Subnet{Prefix: netip.MustParsePrefix(p)})
		}
		return list
	}
	for name, tt := range map[string]struct {
		data string
		want func(*Config)
	}{
		"an empty file is the default": {"", func(*Config) {}},
		"a byte order mark and CRLF are fine": {
			"\ufefflifetime = \"1s\"\r\n[[subnet]]\r\nprefix = \"10.0.0.0/8\"\r\n",
			func(c *Config) { c.Lifetime, c.Subnets = time.Second, subnets("10.0.0.0/8") },
		},
		"auto means auto for now":       {`backend = "auto"`, func(*Config) {}},
		"an empty array empties a list": {"exclude_peer_ports = []", func(c *Config) { c.ExcludePeerPorts = nil }},
		"ports may be ranges, in any order, and overlap": {
			`exclude_ports = ["5062-5064", 5060, "5063-5065", "65535-65535"]`,
			func(c *Config) { c.ExcludePorts = []uint16{5060, 5062, 5063, 5064, 5065, 65535} },
		},
		"all peers can be excluded": {
			`exclude_peers = ["0.0.0.0/0"]`,
			func(c *Config) { c.ExcludePeers = []netip.Prefix{netip.MustParsePrefix("0.0.0.0/0")} },
		},
		"subnets may be inline tables": {
			"subnet = [{prefix = \"10.0.0.0/16\"},\n {prefix = \"10.1.0.0/16\", routed = false}]",
			func(c *Config) { c.Subnets = subnets("10.0.0.0/16", "10.1.0.0/16") },
		},
		"adjacent subnets do not overlap": {
			"[[subnet]]\nprefix = \"10.0.0.0/25\"\n[[subnet]]\nprefix = \"10.0.0.128/25\"",
			func(c *Config) { c.Subnets = subnets("10.0.0.0/25", "10.0.0.128/25") },
		},
		"a subnet can be one host": {
			"[[subnet]]\nprefix = \"192.168.1.7/32\"",
			func(c *Config) { c.Subnets = subnets("192.168.1.7/32") },
		},
		"auto beside a subnet": {
			"[[subnet]]\nprefix = \"auto\"\n[[subnet]]\nprefix = \"2001:db8::/64\"",
			func(c *Config) { c.AutoSubnets, c.Subnets = true, subnets("2001:db8::/64") },
		},
		"limits belong to their range": {
			"lifetime = \"24h\"\nreconcile = \"1h\"\nevent_buffer = 1073741824",
			func(c *Config) { c.Lifetime, c.Reconcile, c.EventBuffer = 24*time.Hour, time.Hour, 1<<30 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := Default()
			tt.want(&want)
			got, err := whole("f.toml", tt.data)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

// whole is Load for a text.
func whole(path, data string) (Config, error) {
	f, between, err := parse(path, data)
	if err = usage(err, between); err != nil {
		return Config{}, err
	}
	return f.config, nil
}

func TestLoadReadsAFile(t *testing.T) {
	got, err := Load(write(t, every))
	if err != nil {
		t.Fatal(err)
	}
	if want := everyConfig(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestLoadNamesAFileItCannotRead(t *testing.T) {
	dir := t.TempDir()
	for path, cause := range map[string]string{
		filepath.Join(dir, "none.toml"): "no such file or directory",
		dir:                             "is a directory",
	} {
		_, err := Load(path)
		want := path + ": expected a readable file: " + cause
		if err == nil || err.Error() != want || IsUsage(err) { // it may be mounted later
			t.Errorf("\ngot  %v\nwant %s", err, want)
		}
	}
}

func TestDefaultsAreNotShared(t *testing.T) {
	Default().ExcludePeerPorts[0] = 1
	if got := Default().ExcludePeerPorts[0]; got != 53 {
		t.Errorf("a caller changed the default to %d", got)
	}
}
