package daemon

import (
	"testing"

	"github.com/conenatd/conenatd/internal/config"
)

func TestPoolIsClearOfTheGatewaysOwnPorts(t *testing.T) {
	standard := config.Default().PortPool
	r := func(first, last uint16) config.PortRange { return config.PortRange{First: first, Last: last} }
	for name, tc := range map[string]struct {
		given, reserved string
		wanted, pool    config.PortRange
	}{
		"the kernel's range":                     {"32768\t60999", "", standard, standard},
		"that before Linux 4.2":                  {"32768\t61000", "", standard, r(61001, 65535)},
		"all that users may have":                {"1024\t65535", "", standard, config.PortRange{}},
		"the same, the pool reserved":            {"1024\t65535", "61000-65535", standard, standard},
		"the same, others reserved":              {"1024\t65535", "8080,9000-9999\n", standard, r(9000, 9999)},
		"the same, too few reserved":             {"1024\t65535", "1080,9000-9010,62000-62062", standard, config.PortRange{}},
		"the pool reserved in two parts":         {"1024\t65535", "61000-62000,62001-65535", standard, standard},
		"wide":                                   {"10000\t65000", "", standard, r(5464, 9999)},
		"enough of the pool is left":             {"15000\t64000", "", standard, r(64001, 65535)},
		"the dynamic ports of IANA":              {"49152\t65535", "", standard, r(44616, 49151)},
		"all but the lowest":                     {"2048\t65535", "", standard, r(1024, 2047)},
		"narrow":                                 {"61100\t61102", "", standard, r(61103, 65535)},
		"narrow, in the middle":                  {"63000\t63000", "", standard, r(63001, 65535)},
		"a pool that was chosen":                 {"32768\t60999", "", r(20000, 29999), r(20000, 29999)},
		"a chosen one that is used in part":      {"32768\t60999", "", r(50000, 65535), r(61000, 65535)},
		"a chosen one of which little is left":   {"10080\t60999", "", r(10000, 20000), r(10000, 10079)},
		"a chosen one of which nothing is left":  {"10000\t60999", "", r(10000, 20000), config.PortRange{}},
		"a chosen one below what users may have": {"1024\t65535", "", r(512, 1023), r(512, 1023)},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := newLocalPorts(tc.given, tc.reserved)
			if err != nil {
				t.Fatal(err)
			}
			pool, ok := l.choosePool(tc.wanted)
			if ok != (tc.pool != config.PortRange{}) || ok && pool != tc.pool {
				t.Errorf("got %v, %v; want %v", pool, ok, tc.pool)
			}
		})
	}
}

func TestReservedPortsAreKeptInTheLineThatMends(t *testing.T) {
	for reserved, want := range map[string]string{
		"\n":               "sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535",
		"8080,9000-9010\n": "sysctl -w net.ipv4.ip_local_reserved_ports=8080,9000-9010,61000-65535",
	} {
		l, err := newLocalPorts("1024\t65535\n", reserved)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.reserve(config.Default().PortPool); got != want {
			t.Errorf("got %q", got)
		}
	}
	for _, bad := range [][2]string{{"", ""}, {"1024", ""}, {"1024 70000", ""}, {"1024 65535", "x"}, {"1024 65535", "1-70000"}} {
		if _, err := newLocalPorts(bad[0], bad[1]); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}
