package portpool

import (
	"testing"

	"github.com/conenatd/conenatd/internal/config"
)

func TestPoolIsClearOfTheGatewaysOwnPorts(t *testing.T) {
	standard := config.Default().PortPool
	for name, tc := range map[string]struct {
		given, reserved string
		wanted, pool    config.PortPool
	}{
		"the kernel's range":                     {"32768\t60999", "", standard, standard},
		"that before Linux 4.2":                  {"32768\t61000", "", standard, "61001-65535"},
		"all that users may have":                {"1024\t65535", "", standard, ""},
		"the same, the pool reserved":            {"1024\t65535", "61000-65535", standard, standard},
		"the same, others reserved":              {"1024\t65535", "8080,9000-9999\n", standard, "9000-9999"},
		"the same, too few reserved":             {"1024\t65535", "1080,9000-9010,62000-62062", standard, ""},
		"the pool reserved in two parts":         {"1024\t65535", "61000-62000,62001-65535", standard, standard},
		"wide":                                   {"10000\t65000", "", standard, "5464-9999"},
		"enough of the pool is left":             {"15000\t64000", "", standard, "64001-65535"},
		"the dynamic ports of IANA":              {"49152\t65535", "", standard, "44616-49151"},
		"all but the lowest":                     {"2048\t65535", "", standard, "1024-2047"},
		"narrow":                                 {"61100\t61102", "", standard, "61103-65535"},
		"narrow, in the middle":                  {"63000\t63000", "", standard, "63001-65535"},
		"a pool that was chosen":                 {"32768\t60999", "", "20000-29999", "20000-29999"},
		"a chosen one that is used in part":      {"32768\t60999", "", "50000-65535", "61000-65535"},
		"a chosen one of which little is left":   {"10080\t60999", "", "10000-20000", "10000-10079"},
		"a chosen one of which nothing is left":  {"10000\t60999", "", "10000-20000", ""},
		"a chosen one below what users may have": {"1024\t65535", "", "512-1023", "512-1023"},
		"a small one":                            {"32768\t60999", "", "5061", "5061"},
		"blocks":                                 {"32768\t60999", "", "7472-7487,11568-11583", "7472-7487,11568-11583"},
		"blocks, one of them used in part":       {"11570\t60999", "", "7472-7487,11568-11583", "7472-7487,11568-11569"},
		"blocks, one of them used":               {"11000\t60999", "", "7472-7487,11568-11583", "7472-7487"},
	} {
		t.Run(name, func(t *testing.T) {
			l, err := newLocal(tc.given, tc.reserved)
			if err != nil {
				t.Fatal(err)
			}
			pool, ok := l.Choose(tc.wanted)
			if ok != (tc.pool != "") || ok && pool.Text() != tc.pool.String() {
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
		l, err := newLocal("1024\t65535\n", reserved)
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Reserve(config.Default().PortPool.Ranges()); got != want {
			t.Errorf("got %q", got)
		}
	}
	for _, bad := range [][2]string{{"", ""}, {"1024", ""}, {"1024 70000", ""}, {"1024 65535", "x"}, {"1024 65535", "1-70000"}} {
		if _, err := newLocal(bad[0], bad[1]); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

// A gateway whose programs get no port any more is worse off than one whose pool overlaps.
func TestLineThatWouldLeaveTheGatewayNoPortsIsNotGiven(t *testing.T) {
	for given, want := range map[string]string{
		"61000\t65535": "port_pool 61000-65535 overlaps the ports of the gateway's own connections (net.ipv4.ip_local_port_range = 61000-65535), " +
			"which need them: choose ports of 1024-60999",
		"60500\t65535": "port_pool 61000-65535 overlaps the ports of the gateway's own connections (net.ipv4.ip_local_port_range = 60500-65535), " +
			"which need them: choose ports of 1024-60499",
		"59000\t65535": "port_pool 61000-65535 overlaps the ports of the gateway's own connections (net.ipv4.ip_local_port_range = 59000-65535): " +
			"keep them apart with 'sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535'",
	} {
		l, err := newLocal(given, "")
		if err != nil {
			t.Fatal(err)
		}
		if got := l.Overlap(config.Default().PortPool.Ranges()); got != want {
			t.Errorf("%q: %s", given, got)
		}
	}
}
