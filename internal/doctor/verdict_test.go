package doctor

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/control"
)

// Fails when a subnet counts as served although nothing gets in, or the other way round.
func TestVerdict(t *testing.T) {
	var three []control.Subnet
	for _, p := range []string{"10.47.11.0/24", "10.47.12.0/24", "10.47.13.0/24"} {
		three = append(three, control.Subnet{Prefix: netip.MustParsePrefix(p)})
	}
	dropped := control.Finding{ID: "children_dropped", About: "10.47.12.0/24", Text: "your firewall drops the flows of peers: inet f forward; let it"}
	noNAT := control.Finding{ID: "no_source_nat", About: "10.47.11.0/24", Text: "no source NAT: 3 flows"}
	blocked := control.Finding{ID: "hosts_blocked", About: "10.47.13.0/24", Text: "your firewall drops all that hosts send outside: inet f forward; let it"}
	open := control.Finding{ID: "subnet_open", About: "10.47.11.0/24", Text: "subnet is open"}
	into := func(subnet string) control.Finding {
		return control.Finding{ID: "children_dropped", About: subnet, Text: "your firewall drops the flows of peers into subnet " + subnet + ": inet f forward; let it"}
	}
	off := control.Finding{ID: "events_off", Text: "the kernel sends no conntrack events: permissions come late"}
	wan := []string{"wan0"}
	for _, tt := range []struct {
		subnets  []control.Subnet
		outside  []string
		findings []control.Finding
		want     string
	}{
		{three, wan, nil, "works"},
		{three, wan, []control.Finding{open}, "works"},
		{three, wan, []control.Finding{dropped, open}, "works for 2 of 3 subnets: 10.47.12.0/24: your firewall drops the flows of peers"},
		{three, wan, []control.Finding{blocked}, "works for 2 of 3 subnets: 10.47.13.0/24: your firewall drops all that hosts send outside"},
		{three[:2], wan, []control.Finding{dropped, noNAT}, "does not work: 10.47.11.0/24: no source NAT; 10.47.12.0/24: your firewall drops the flows of peers"},
		{three, wan, []control.Finding{into("10.47.11.0/24"), noNAT, into("10.47.13.0/24"), blocked}, "works for 1 of 3 subnets: " +
			"10.47.11.0/24 and 1 more: your firewall drops the flows of peers into subnet 10.47.11.0/24"},
		{three, wan, []control.Finding{off}, "works in part: the kernel sends no conntrack events"},
		{three, nil, nil, "does not work: there is no outside link"},
		{nil, wan, []control.Finding{{ID: "no_inside_network", Text: "subnet \"auto\" found no inside network: one is"}}, "does not work: subnet \"auto\" found no inside network"},
		{nil, wan, nil, "works, for the gateway's own programs: no subnet is enabled"},
	} {
		if got := Verdict(control.Status{Subnets: tt.subnets, Outside: tt.outside, Findings: tt.findings}); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// Fails when an error stands behind what matters less, or findings of one severity change places.
func TestWorstFirst(t *testing.T) {
	st := control.Status{Findings: []control.Finding{
		{ID: "hosts_kept_in", Text: "a note"},
		{ID: "of_a_newer_daemon", Text: "unknown"},
		{ID: "children_dropped", Text: "an error"},
		{ID: "no_nftables", Text: "a warning"},
		{ID: "events_off", Text: "another error"},
	}}
	want := []string{"an error", "another error", "unknown", "a warning", "a note"}
	if got := WorstFirst(st); !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}
