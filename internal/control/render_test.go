package control

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files")

// netTypes have unexported fields, which cmp must be told how to compare.
var netTypes = []any{netip.Addr{}, netip.AddrPort{}, netip.Prefix{}}

// full is a status with something in every field.
var full = Status{
	Version: "0.1.0", PID: 1234, Started: now.Add(-26 * time.Hour),
	Backend: "expect", Helper: Helper{IPv4: "conenat"},
	Subnets: []Subnet{
		{Prefix: netip.MustParsePrefix("10.47.11.0/24"), Mapping: "endpoint_independent", Hairpin: true, Carried: Carried{
			By: "expect", Why: "related_accepted", Chain: "inet filter prerouting", Before: BeforeNAT,
			Evidence: []Evidence{{"nft", 12, 0}, {"expect", 8, 7}},
		}},
		{Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true, Filtering: "endpoint_independent", Mapping: "kernel", Carried: Carried{
			By: "expect+nft", Why: "unread", Error: "list chains: interrupted",
		}},
	},
	Outside: []string{"wan0", "wan1"}, OutsideIPv6Only: []string{"wan1"},
	PeerGroups: []netip.Prefix{netip.MustParsePrefix("203.0.113.0/28"), netip.MustParsePrefix("2001:db8:5::/48")}, ExcludePeerPorts: []PortRange{{53, 53}, {10000, 20000}}, Lifetime: 300,
	Permissions: Permissions{Standing: 40, Refused: 2, Waiting: 1, Limit: 65536},
	Tables: Tables{Mapping: Mapping{
		On: true, Moved: 3, PoolUsedUp: 2, Left: 1, Shared: 6, Hairpinned: 4,
		NotApplied: map[string]uint64{"older_flow": 1, "other_endpoint": 4},
	}},
	Conntrack: Conntrack{
		Entries: 1200, Max: 4096, InsertFailed: 3, Drop: 5, EarlyDrop: 7, Invalid: 11, Error: 13, SearchRestart: 17,
		ExpectationsMade: 90, ExpectationsEnded: 50, Expected: 19,
	},
	Flows: 55,
	BrokenFlows: []BrokenFlows{
		{netip.MustParsePrefix("192.168.1.0/24"), "wan0", netip.Addr{}, 2, false, netip.MustParseAddrPort("192.168.1.9:5060"), netip.MustParseAddrPort("203.0.113.5:5060")},
		{netip.MustParsePrefix("192.168.1.0/24"), "wan1", netip.MustParseAddr("198.51.100.1"), 1, true, netip.MustParseAddrPort("192.168.1.9:5061"), netip.MustParseAddrPort("203.0.113.5:5060")},
	},
	Events: Events{Mode: "lean", Received: 9000, Filtered: 120, Malformed: 1, Overruns: 3, ReadBuffer: 8 << 20},
	Counters: Counters{
		Decisions: Decisions{Granted: 412, Conflicts: 7, Early: 5}, Healed: 6, AuditLost: 9, Repaired: map[string]uint64{"anchors": 1, "expectations": 4},
		Refused: map[string]uint64{"table_full": 2, "forwarded": 9},
		Revoked: map[string]uint64{"expired": 372, "stopped": 0},
		Skipped: map[string]uint64{"excluded_peer_port": 8100, "not_outside": 5}, SkippedLinks: map[string]uint64{"br_lan": 4},
		Failed: map[string]uint64{"look_up_flow": 3},
	},
	Latency: Latency{Count: 412, P50: 41.2, P99: 310, Max: 1234.5, Sum: 20000, Buckets: []Bucket{{50, 300}, {1000, 411}}},
	Process: Process{Goroutines: 9, Files: 17, Resident: 25 << 20, Heap: 5 << 20},
	Warnings: []string{
		"IPv6 has no helper: load the module nfnetlink_cthelper",
		"the expectation table is small: set net.netfilter.nf_conntrack_expect_max = 4096",
	},
	Findings: []Finding{
		{ID: "feature_missing", About: "helper for IPv6", Text: "IPv6 has no helper: load the module nfnetlink_cthelper"},
		{ID: "table_small", Text: "the expectation table is small: set net.netfilter.nf_conntrack_expect_max = 4096"},
	},
	Verification: &Verification{
		Permissions: 2, Expectations: 1, Elements: 2, Flows: 9,
		Wrong: []Wrong{{"not_in_kernel", netip.MustParsePrefix("203.0.113.5/32"), proxy.Ext}},
	},
}

func TestWriteStatus(t *testing.T) {
	var out strings.Builder
	if err := WriteStatus(&out, "works in part: IPv6 has no helper", full, true, now); err != nil {
		t.Fatal(err)
	}
	golden(t, "status.txt", out.String())
}

func TestWriteStatusOfAYoungDaemon(t *testing.T) {
	var out strings.Builder
	young := Status{
		Version: "0.1.0", PID: 1234, Started: now, Backend: "expect", Helper: Helper{"conenat", "conenat"},
		Subnets: full.Subnets[:1], Lifetime: 300, Accounting: true, Events: Events{Mode: "all", ReadBuffer: 8 << 20},
	}
	if err := WriteStatus(&out, "works", young, true, now); err != nil {
		t.Fatal(err)
	}
	golden(t, "status-young.txt", out.String())
}

// Fails when the status of a normal gateway takes more than a screen of 80 by 24, with a line
// for the verdict, or lacks something that went wrong.
func TestShortStatusFitsOnAScreen(t *testing.T) {
	normal := Status{
		Version: "0.1.0", PID: 1234, Started: now.Add(-50 * time.Hour), Backend: "expect+nft", Helper: Helper{"conenat-1234567", "conenat-1234567"},
		Subnets: []Subnet{
			{Prefix: netip.MustParsePrefix("192.168.1.0/24"), Mapping: "endpoint_independent", Carried: Carried{By: "nft", Why: "dnat_accepted"}},
			{Prefix: netip.MustParsePrefix("192.168.2.0/24"), Mapping: "endpoint_independent", Carried: Carried{By: "expect", Why: "related_accepted", Chain: "inet filter forward"}},
		},
		Outside: []string{"wan0"}, Lifetime: 300, Accounting: true, Flows: 123456,
		Permissions: Permissions{Standing: 123456, Limit: 1 << 20, Expectations: 12345},
		Tables: Tables{
			Guard: Guard{On: true, Drops: 1 << 40}, Map: Map{On: true, Learn: true, Admitted: 1 << 30, Passed: 1 << 30, Learned: 1 << 30},
			Mapping: Mapping{On: true}, Expected: Expected{Admitted: 1 << 20, Passed: 1 << 20},
		},
		Conntrack: Conntrack{Entries: 123456, Max: 262144},
		Counters:  Counters{Decisions: Decisions{Granted: 1 << 30}, Skipped: map[string]uint64{"excluded_peer_port": 1 << 30}},
	}
	var out strings.Builder
	if err := WriteStatus(&out, "works", normal, false, now); err != nil {
		t.Fatal(err)
	}
	fitsOnAScreen(t, out.String())
	out.Reset()
	normal.Events.Overruns, normal.Counters.Refused = 3, map[string]uint64{"table_full": 7}
	if err := WriteStatus(&out, "works", normal, false, now); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\noverruns     3 ", "\nrefused      7 (kernel table is full: 7)"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

func fitsOnAScreen(t *testing.T, text string) {
	t.Helper()
	rows := 0
	for line := range strings.Lines(text) {
		rows += 1 + (len(line)-2)/80
	}
	if rows > 23 { // and the prompt
		t.Errorf("%d rows:\n%s", rows, text)
	}
}

// Fails when many subnets and warnings push the verdict off the screen, when nothing tells of what
// is left out, and when --verbose leaves it out, too.
func TestShortStatusOfManySubnetsFitsOnAScreen(t *testing.T) {
	many := Status{
		Version: "0.1.0", PID: 1234, Started: now, Backend: "expect+nft", Helper: Helper{"conenat", "conenat"}, Accounting: true,
		Tables: Tables{Guard: Guard{On: true}, Map: Map{On: true, Learn: true}, Expected: Expected{Admitted: 9}},
	}
	for i := range 40 {
		prefix := netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 47, byte(i), 0}), 24)
		carried := Carried{By: "nft", Why: "dnat_accepted"}
		if i%2 > 0 {
			carried = Carried{By: "expect", Why: "related_accepted", Chain: "inet filter forward"}
		}
		many.Subnets = append(many.Subnets, Subnet{Prefix: prefix, Filtering: "endpoint_independent", Carried: carried})
		many.Outside = append(many.Outside, fmt.Sprintf("wan%d", i))
		many.Warnings = append(many.Warnings, fmt.Sprintf("warning about %v: %s", prefix, strings.Repeat("it has many words, ", 9)))
	}
	var short, verbose strings.Builder
	if err := errors.Join(WriteStatus(&short, "works for 0 of 40 subnets", many, false, now), WriteStatus(&verbose, "works", many, true, now)); err != nil {
		t.Fatal(err)
	}
	fitsOnAScreen(t, short.String())
	for _, want := range []string{"10.47.1.0/24 (filtering endpoint_independent), and 38 more", "(10.47.1.0/24, 10.47.3.0/24, and 18 more)", "\n  and 3"} {
		if !strings.Contains(short.String(), want) {
			t.Errorf("no %q in\n%s", want, short.String())
		}
	}
	if n := strings.Count(verbose.String(), "warning about "); n != 40 || strings.Contains(verbose.String(), " more") {
		t.Errorf("%d warnings in\n%s", n, verbose.String())
	}
}

func TestWriteTable(t *testing.T) {
	sip := standing("10.47.11.9:5060", "198.51.100.1:5060", "203.0.113.5")
	old := standing("10.47.11.110:40000", "198.51.100.1:40001", "203.0.113.6")
	old.Since, old.Expires = now.Add(-50*time.Hour), now.Add(-time.Second)
	old.Flows = 0
	refused := Permission{
		Int: old.Int, Ext: old.Ext, Peer: netip.MustParseAddr("192.0.2.77"),
		State: "refused", Reason: "table_full", Flows: 1,
	}
	zoned := standing("[2001:db8:47::5]:5060", "[2001:db8:47::5]:5060", "2001:db8:5::5")
	zoned.Zone = 7
	for name, ps := range map[string][]Permission{
		"table.txt":       {old, proxy, sip},
		"table-all.txt":   {zoned, refused, old, proxy, sip},
		"table-empty.txt": nil,
	} {
		golden(t, name, table(t, ps, nil))
	}
}

// table returns ps as a table. It calls each after each permission with what is written by then.
func table(t *testing.T, ps []Permission, each func(i int, written string)) string {
	t.Helper()
	var out strings.Builder
	w := NewTableWriter(&out, now)
	for i, p := range ps {
		if err := w.Write(p); err != nil {
			t.Fatal(err)
		}
		if each != nil {
			each(i, out.String())
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// A long table begins before its end is known, and has each permission once. Fails when it
// waits for the last one, or when it loses what it held.
func TestALongTableBeginsAtOnce(t *testing.T) {
	ps := make([]Permission, sortedAtMost+100)
	for i := range ps {
		n := len(ps) - i
		ps[i] = standing(fmt.Sprintf("10.47.%d.%d:5060", n>>8, n&0xff), "198.51.100.1:5060", "203.0.113.5")
	}
	text := table(t, ps, func(i int, written string) {
		if begun := strings.Count(written, "\n") > sortedAtMost; begun != (i >= sortedAtMost) {
			t.Fatalf("after permission %d: begun %v", i, begun)
		}
	})
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	if len(lines) != 1+len(ps) || !strings.HasPrefix(lines[1], "10.47.0.100:5060 ") {
		t.Errorf("%d lines for %d permissions, the first %q", len(lines), len(ps), lines[1])
	}
	slices.Sort(lines)
	if all := len(slices.Compact(lines)); all != 1+len(ps) {
		t.Errorf("%d different lines for %d permissions", all, len(ps))
	}
}

func TestSpan(t *testing.T) {
	for text, want := range map[string]string{
		"-1s": "0s", "59.9s": "59s", "60s": "1m00s", "59m59s": "59m59s",
		"1h": "1h00m", "23h59m": "23h59m", "24h": "1d00h", "2500h": "104d04h",
	} {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatal(err)
		}
		if got := span(d); got != want {
			t.Errorf("span(%s) = %s, want %s", text, got, want)
		}
	}
}

// golden compares got with a file of testdata; -update writes the file.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}
