package config

import (
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"
)

// resolve does what main does with a command line.
func resolve(t *testing.T, args ...string) (Config, error) {
	t.Helper()
	var f Flags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	f.Register(fs)
	if err := fs.Parse(args); err != nil {
		t.Fatal(err)
	}
	return f.Resolve()
}

// write puts data into a file and returns its path.
func write(t *testing.T, data string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestFlagsAndFileSayTheSame(t *testing.T) {
	got, err := resolve(
		t, "--backend=expect", "--lifetime=90s", "--reconcile=1m", "--log-level=debug", "--log-format=json", "--audit-log=/var/log/a", "--audit-peers",
		"--outside=wan0", "--outside=ppp0", "--inside=lan0", "--uplink-marks", "--uplink-mask=0xff00", "--peer-group=198.51.100.0/28", "--peer-group=2001:db9::/64",
		"--exclude-peer=203.0.113.0/24", "--exclude-peer=2001:db8::/32",
		"--port-pool=30016-30031", "--port-pool=20000-29999", "--mapping-exempt=192.0.2.0/24", "--exclude-peer-port=53", "--exclude-port=5060", "--exclude-port=65535",
		"--max-permissions=1000", "--max-permissions-per-subnet=500", "--max-permissions-per-host=50",
		"--heal-flows", "--max-children=10", "--self", "--learn=false", "--learn-rate=7", "--events=all", "--quiet", "--guard=false", "--table=cone2", "--on-stop=keep", "--event-buffer=65536", "--control-socket=/run/c.sock", "--metrics-listen=127.0.0.1:9469", "--page=everywhere",
		"--subnet=192.168.1.0/24", "--subnet=2001:db8:1::/64", "--subnet=lan0", "--subnet=auto",
	)
	if err != nil {
		t.Fatal(err)
	}
	want := everyConfig()
	want.Subnets[1].Routed, want.Subnets[1].Filtering = false, AddressDependent // one flag is for all or none
	want.AutoRouted = false
	want.Subnets[0].Mapping, want.Hairpin = KernelMapping, false // not with "auto"
	want.LinkSubnets[0].Like = Subnet{}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestResolve(t *testing.T) {
	subnet := func(prefix string, routed bool) []Subnet {
		return []Subnet{{Prefix: netip.MustParsePrefix(prefix), Routed: routed}}
	}
	path := write(t, "lifetime = \"1m\"\nexclude_ports = [1]\n[[subnet]]\nprefix = \"auto\"\n[[subnet]]\nprefix = \"10.0.0.0/8\"\n")
	hairpin := write(t, "hairpin = true")
	for name, tt := range map[string]struct {
		args []string
		want func(*Config)
	}{
		"no flag at all is the default": {nil, func(*Config) {}},
		"one subnet suffices": {
			[]string{"--subnet", "192.168.1.0/24"},
			func(c *Config) { c.Subnets = subnet("192.168.1.0/24", false) },
		},
		"routed goes for the subnets of the command line": {
			[]string{"--routed", "--subnet", "2001:db8::/64"},
			func(c *Config) { c.Subnets = subnet("2001:db8::/64", true) },
		},
		"routed goes for auto": {
			[]string{"--routed", "--subnet", "auto"},
			func(c *Config) { c.AutoSubnets, c.AutoRouted = true, true },
		},
		"the file overrides the default": {
			[]string{"--config", path},
			func(c *Config) {
				c.Lifetime, c.ExcludePorts = time.Minute, []uint16{1}
				c.AutoSubnets, c.Subnets = true, subnet("10.0.0.0/8", false)
			},
		},
		"what is missing in the file comes from the command line": {
			[]string{"--config", hairpin, "--subnet=192.168.1.0/24", "--mapping=endpoint_independent"},
			func(c *Config) {
				c.Subnets = subnet("192.168.1.0/24", false)
				c.Subnets[0].Mapping, c.Hairpin = EndpointIndependentMapping, true
			},
		},
		"flags override the file, subnets as a whole": {
			[]string{"--subnet=192.168.1.0/24", "--lifetime=2m", "--exclude-port=2", "--config", path},
			func(c *Config) {
				c.Lifetime, c.ExcludePorts = 2*time.Minute, []uint16{2}
				c.Subnets = subnet("192.168.1.0/24", false)
			},
		},
		"of a single value the last one wins": {
			[]string{"--lifetime=2m", "--lifetime=3m"},
			func(c *Config) { c.Lifetime = 3 * time.Minute },
		},
		"an empty text empties a list": {
			[]string{"--exclude-peer-port="},
			func(c *Config) { c.ExcludePeerPorts = nil },
		},
	} {
		t.Run(name, func(t *testing.T) {
			want := Default()
			tt.want(&want)
			got, err := resolve(t, tt.args...)
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("got  %+v\nwant %+v", got, want)
			}
		})
	}
}

func TestWrongFlagsAreNamed(t *testing.T) {
	path := write(t, "backend = 1\nreconcile = 2\n")
	hairpin, kernel := write(t, "\nhairpin = true"), write(t, "[[subnet]]\nprefix = \"192.168.1.0/24\"")
	const unmapped = `expected a subnet with mapping = "endpoint_independent": hosts are found by their mappings`
	for name, tt := range map[string]struct {
		args []string
		want string
	}{
		"duration":           {[]string{"--lifetime=5"}, `--lifetime: expected a duration between 1s and 24h such as "5m", got "5"`},
		"port out of range":  {[]string{"--exclude-port=1", "--exclude-port=70000"}, `--exclude-port: expected a port between 1 and 65535 or a range such as "10000-20000", got 70000`},
		"port with a name":   {[]string{"--exclude-peer-port=sip"}, `--exclude-peer-port: expected a port between 1 and 65535 or a range such as "10000-20000", got "sip"`},
		"buffer with a unit": {[]string{"--event-buffer=8M"}, `--event-buffer: expected bytes between 65536 (64 KiB) and 1073741824 (1 GiB), got "8M"`},
		"peer":               {[]string{"--exclude-peer=203.0.113.7/24"}, `--exclude-peer: expected a prefix without host bits, got "203.0.113.7/24"; did you mean "203.0.113.0/24"?`},
		"subnet":             {[]string{"--subnet=192.168.1.1"}, `--subnet: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got "192.168.1.1"`},
		"empty subnet":       {[]string{"--subnet="}, `--subnet: expected a prefix such as "192.168.1.0/24", a link such as "lan0", or "auto", got ""`},
		"nested subnets": {
			[]string{"--subnet=10.0.0.0/8", "--subnet=10.1.0.0/16"},
			`--subnet: expected subnets that do not overlap, got "10.1.0.0/16" inside "10.0.0.0/8" of --subnet; a host belongs to one subnet, so keep one of the two`,
		},
		"routed without a subnet": {[]string{"--routed"}, `--routed: expected a --subnet beside it`},
		"mapped auto":             {[]string{"--mapping=endpoint_independent", "--subnet=auto"}, `--subnet: expected a prefix beside mapping: which networks it is for should not be guessed, got "auto"`},
		"empty path":              {[]string{"--config="}, `--config: expected the path of a file, got ""`},
		"no such file, wrong flag": {
			[]string{"--config=/none/c.toml", "--lifetime=5"},
			`/none/c.toml: expected a readable file: no such file or directory
--lifetime: expected a duration between 1s and 24h such as "5m", got "5"`,
		},
		"one key and another": {[]string{"--config", hairpin, "--subnet=192.168.1.0/24"}, hairpin + ":2:11: hairpin: " + unmapped},
		"a key and a flag":    {[]string{"--config", kernel, "--hairpin"}, "hairpin: " + unmapped},
		"file and flags together": {
			[]string{"--log-level=loud", "--config", path, "--outside=a/b"},
			path + `:1:11: backend: expected "auto", "expect" or "nft", got 1
` + path + `:2:13: reconcile: expected a duration between 1s and 1h such as "30s", got 2
--log-level: expected "debug", "info", "warn" or "error", got "loud"
--outside: expected the name of a link such as "wan0", got "a/b"`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := resolve(t, tt.args...)
			if err == nil || err.Error() != tt.want {
				t.Fatalf("\ngot  %v\nwant %s", err, tt.want)
			}
			if !IsUsage(err) {
				t.Errorf("not a UsageError: %v", err)
			}
		})
	}
}

func TestEveryCallOfResolveReadsTheFileAnew(t *testing.T) {
	path := write(t, `lifetime = "1m"`)
	var f Flags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	f.Register(fs)
	if err := fs.Parse([]string{"--config", path, "--reconcile=1m"}); err != nil {
		t.Fatal(err)
	}
	for _, lifetime := range []string{"1m0s", "2m0s"} {
		data := `lifetime = "` + lifetime + `"`
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := f.Resolve()
		if err != nil || c.Lifetime.String() != lifetime || c.Reconcile != time.Minute {
			t.Errorf("got %+v, %v after %s", c, err, data)
		}
	}
}

func TestHelpShowsTheDefaults(t *testing.T) {
	var args []string
	for _, s := range settings {
		for def := range strings.SplitSeq(flagText(s.initial()), ",") {
			args = append(args, "--"+s.Flag+"="+def)
		}
	}
	got, err := resolve(t, args...)
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("the defaults shown make %+v\nnot %+v", got, want)
	}
}

// Puts each flag of run before another flag: a boolean without a value and with each value,
// any other flag with its value in the same word and in the next.
func TestEveryFlag(t *testing.T) {
	path := write(t, `lifetime = "1m"`)
	// The other flags that a flag needs, and, if it takes a value, one that is not the
	// default.
	subnet := []string{"--subnet=192.168.1.0/24"}
	flags := map[string]struct {
		value string
		with  []string
		get   func(Config) any
		want  any
	}{
		"config":                     {path, nil, func(c Config) any { return c.Lifetime }, time.Minute},
		"subnet":                     {"192.168.1.0/24", nil, func(c Config) any { return c.Subnets[0].Prefix.String() }, "192.168.1.0/24"},
		"routed":                     {"", subnet, func(c Config) any { return c.Subnets[0].Routed }, true},
		"filtering":                  {"endpoint_independent", subnet, func(c Config) any { return c.Subnets[0].Filtering }, EndpointIndependent},
		"mapping":                    {"endpoint_independent", subnet, func(c Config) any { return c.Subnets[0].Mapping }, EndpointIndependentMapping},
		"backend":                    {"nft", nil, func(c Config) any { return c.Backend }, BackendNFT},
		"lifetime":                   {"2m", nil, func(c Config) any { return c.Lifetime }, 2 * time.Minute},
		"reconcile":                  {"2m", nil, func(c Config) any { return c.Reconcile }, 2 * time.Minute},
		"log-level":                  {"debug", nil, func(c Config) any { return c.LogLevel }, slog.LevelDebug},
		"log-format":                 {"json", nil, func(c Config) any { return c.LogFormat }, JSONLog},
		"audit-log":                  {"/var/log/a", nil, func(c Config) any { return c.AuditLog }, "/var/log/a"},
		"audit-peers":                {"", nil, func(c Config) any { return c.AuditPeers }, true},
		"outside":                    {"wan0", nil, func(c Config) any { return c.Outside[0] }, "wan0"},
		"inside":                     {"lan0", nil, func(c Config) any { return c.Inside[0] }, "lan0"},
		"port-pool":                  {"20000-29999,5061", nil, func(c Config) any { return c.PortPool }, PortPool("5061,20000-29999")},
		"mapping-exempt":             {"192.0.2.0/24", nil, func(c Config) any { return c.MappingExempt[0].String() }, "192.0.2.0/24"},
		"heal-flows":                 {"", nil, func(c Config) any { return c.HealFlows }, true},
		"self":                       {"", subnet, func(c Config) any { return c.Self }, true},
		"hairpin":                    {"", append(subnet, "--mapping=endpoint_independent"), func(c Config) any { return c.Hairpin }, true},
		"uplink-marks":               {"", []string{"--outside=wan0"}, func(c Config) any { return c.UplinkMarks }, true},
		"uplink-mask":                {"0xff00", nil, func(c Config) any { return c.UplinkMask }, uint32(0xff00)},
		"peer-group":                 {"203.0.113.0/24", nil, func(c Config) any { return c.PeerGroups[0].String() }, "203.0.113.0/24"},
		"exclude-peer":               {"203.0.113.0/24", nil, func(c Config) any { return c.ExcludePeers[0].String() }, "203.0.113.0/24"},
		"exclude-peer-port":          {"7", nil, func(c Config) any { return c.ExcludePeerPorts[0] }, uint16(7)},
		"exclude-port":               {"6-7", nil, func(c Config) any { return c.ExcludePorts[1] }, uint16(7)},
		"max-permissions":            {"7", nil, func(c Config) any { return c.MaxPermissions }, 7},
		"max-permissions-per-subnet": {"7", nil, func(c Config) any { return c.MaxPermissionsPerSubnet }, 7},
		"max-permissions-per-host":   {"7", nil, func(c Config) any { return c.MaxPermissionsPerHost }, 7},
		"max-children":               {"7", nil, func(c Config) any { return c.MaxChildren }, 7},
		"learn":                      {"", nil, func(c Config) any { return c.Learn }, true},
		"learn-rate":                 {"7", nil, func(c Config) any { return c.LearnRate }, 7},
		"events":                     {"lean", nil, func(c Config) any { return c.Events }, LeanEvents},
		"quiet":                      {"", nil, func(c Config) any { return c.Quiet }, true},
		"guard":                      {"", nil, func(c Config) any { return c.Guard }, true},
		"table":                      {"cone2", nil, func(c Config) any { return c.Table }, "cone2"},
		"on-stop":                    {"keep", nil, func(c Config) any { return c.OnStop }, OnStopKeep},
		"event-buffer":               {"65536", nil, func(c Config) any { return c.EventBuffer }, 65536},
		"metrics-listen":             {"[::1]:9469", nil, func(c Config) any { return c.MetricsListen.String() }, "[::1]:9469"},
		"page":                       {"off", nil, func(c Config) any { return c.Page }, PageOff},
		"control-socket":             {"/run/c.sock", nil, func(c Config) any { return c.ControlSocket }, "/run/c.sock"},
	}
	var f Flags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	f.Register(fs)
	fs.VisitAll(func(flag *pflag.Flag) {
		tt, ok := flags[flag.Name]
		if !ok {
			t.Errorf("--%s is not tested here", flag.Name)
			return
		}
		t.Run(flag.Name, func(t *testing.T) {
			name := "--" + flag.Name
			lines := map[string]any{name + "=" + tt.value: tt.want, name + " " + tt.value: tt.want}
			if flag.Value.Type() == "bool" {
				lines = map[string]any{name: true, name + "=true": true, name + "=false": false}
			}
			// The next flag, whose own words must still be read as such.
			const next = "--exclude-port 4242"
			for line, want := range lines {
				args := slices.Concat(strings.Fields(line), strings.Fields(next), tt.with)
				if flag.Name == "exclude-port" {
					args = slices.Concat(strings.Fields(line), []string{"--exclude-peer-port", "4242"})
				}
				var f Flags
				fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
				f.Register(fs)
				if err := fs.Parse(args); err != nil || fs.NArg() != 0 {
					t.Errorf("%q: %v, left over %q", args, err, fs.Args())
					continue
				}
				c, err := f.Resolve()
				if err != nil {
					t.Errorf("%q: %v", args, err)
					continue
				}
				if got := tt.get(c); got != want {
					t.Errorf("%q: got %v, want %v", args, got, want)
				}
				if !slices.Contains(append(c.ExcludePorts, c.ExcludePeerPorts...), 4242) {
					t.Errorf("%q: the flag behind it was lost", args)
				}
			}
		})
	})
}
