package userrules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A forwardReader reads forwards again and again.
type forwardReader struct {
	*userrules.Reader
	forwarder userrules.Forwarder
}

func (r *forwardReader) read() (all []userrules.Forward, same bool, err error) {
	rs, err := r.Read()
	if err != nil {
		return nil, false, err
	}
	all, same = r.forwarder.Forwards(rs, nil)
	return all, same, nil
}

// A reading is the result of a forwardReader.
type reading struct {
	forwards []string
	same     bool
}

func read(t *testing.T, r *forwardReader) (got reading) {
	t.Helper()
	all, same, err := r.read()
	check(t, err)
	for _, f := range all {
		for port := range strings.SplitSeq(strings.TrimSuffix(brief(f), " > ip"), ",") {
			got.forwards = append(got.forwards, port+" > ip")
		}
	}
	slices.Sort(got.forwards)
	got.forwards, got.same = slices.Compact(got.forwards), same
	return got
}

func reader(t *testing.T, l *lab.Lab) *forwardReader {
	t.Helper()
	return &forwardReader{Reader: newReader(t, l)}
}

// The ruleset is a new one only if something changed that matters to packets.
func TestForwardsAreReadAgainOnlyIfTheyChanged(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + `table ip fw {
	map m { type inet_service : ipv4_addr; elements = { 5060 : 10.47.11.109 }; }
	set unasked { type ipv4_addr; }
	chain pre { type nat hook prerouting priority dstnat
		ip saddr @unasked drop
		iifname "wan0" udp dport 7000 counter dnat to 10.47.11.109
		iifname "wan0" dnat to udp dport map @m
		iifname "wan0" jump more
	}
	chain more { }
	chain idle { }
}
table ip filter { chain c { }; }
`})
	r := reader(t, l)
	want := []string{"5060 > ip", "7000 > ip"}
	if got := read(t, r); got.same || !slices.Equal(got.forwards, want) {
		t.Errorf("at first %+v, want %v", got, want)
	}
	for _, step := range []struct {
		nft  string
		same bool
		add  string
	}{
		{"", true, ""},
		{"add rule ip filter c udp dport 9 accept", true, ""},
		{"add element ip fw unasked { 10.0.0.1 }", true, ""},
		{"add table ip other", true, ""},
		{"add element ip fw m { 5071 : 10.47.11.110 }", false, "5071 > ip"},
		{"add rule ip fw more udp dport 5062 dnat to 10.47.11.110", false, "5062 > ip"},
		{"add chain ip other c { type nat hook prerouting priority 7; }; add rule ip other c udp dport 5063 redirect", false, "5063 > ip"},
		{"", true, ""},
	} {
		if step.nft != "" {
			check(t, l.NFT(step.nft))
		}
		if step.add != "" {
			want = append(want, step.add)
			slices.Sort(want)
		}
		if got := read(t, r); got.same != step.same || !slices.Equal(got.forwards, want) {
			t.Errorf("after %q %+v, want %v, same %v", step.nft, got, want, step.same)
		}
	}
	check(t, l.NFT("delete element ip fw m { 5071 : 10.47.11.110 }"))
	want = slices.DeleteFunc(want, func(s string) bool { return strings.HasPrefix(s, "5071") })
	got := read(t, r)
	if got = read(t, r); !slices.Equal(got.forwards, want) {
		t.Errorf("after one went %v, want %v", got.forwards, want)
	}
	check(t, l.NFT("delete table ip fw"))
	read(t, r)
	if got := read(t, r); !slices.Equal(got.forwards, []string{"5063 > ip"}) {
		t.Errorf("after the table went %v", got.forwards)
	}
}

// A forward that exists all the time is never missed, however much is changed during the
// reading.
func TestForwardsAreNotMissedWhileRulesChange(t *testing.T) {
	var b strings.Builder
	for i := range 300 {
		fmt.Fprintf(&b, "udp dport %d dnat to 10.47.11.109\n", 10000+i)
	}
	l := lab.ForTest(t, lab.Options{Rules: "table ip fw { chain pre { type nat hook prerouting priority dstnat\n" + b.String() + "}; chain busy { type nat hook prerouting priority 5; }; }"})
	r := reader(t, l)
	covers := func() {
		t.Helper()
		all, _, err := r.read()
		check(t, err)
		c := userrules.Cover(all)
		for i := range 300 {
			if !c.Covers(cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(10000+i)))) {
				t.Fatalf("port %d is missed", 10000+i)
			}
		}
	}
	covers()
	stop := changing(t, l, "insert rule ip fw busy udp dport 9 accept; flush chain ip fw busy")
	for range 50 {
		covers()
	}
	stop()
}

// changing runs nft's commands again and again, until stop is called.
func changing(t *testing.T, l *lab.Lab, commands string) (stop func()) {
	t.Helper()
	end, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for {
			select {
			case <-end:
				ended <- nil
				return
			default:
			}
			if err := l.NFT(commands); err != nil {
				ended <- err
				return
			}
		}
	}()
	return func() {
		t.Helper()
		close(end)
		check(t, <-ended)
	}
}

// Changes to other rules than those that forward, even in the same table, are no reason to
// decode these again. Fails when an interrupted dump is taken for another ruleset, which
// costs ten times as much.
func TestForwardsAreTheSameWhileOtherRulesOfTheirTableChange(t *testing.T) {
	var b strings.Builder
	for i := range 5000 {
		fmt.Fprintf(&b, "udp dport %d dnat to 10.47.11.109\n", 10000+i)
	}
	l := lab.ForTest(t, lab.Options{Rules: "table ip fw { chain idle { }; chain pre { type nat hook prerouting priority dstnat\n" + b.String() + "}; }"})
	r := reader(t, l)
	_, _, err := r.read()
	check(t, err)
	stop := changing(t, l, "add rule ip fw idle udp dport 9 accept; flush chain ip fw idle")
	const readings = 20
	others := 0
	for range readings {
		_, same, err := r.read()
		check(t, err)
		if !same {
			others++
		}
	}
	stop()
	// A dump may see the added rule in the microseconds that it exists.
	if others > readings/4 {
		t.Errorf("%d of %d readings took the rules for others", others, readings)
	}
}

// Rules that could not be read are reported as unknown, and the earlier reading still
// counts.
func TestForwardsThatCannotBeReadHold(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.NFT("table ip fw { chain pre { type nat hook prerouting priority dstnat; udp dport 5060 dnat to 10.47.11.109; }; }"))
	r := reader(t, l)
	if got := read(t, r); !slices.Equal(got.forwards, []string{"5060 > ip"}) {
		t.Fatal(got)
	}
	for _, step := range []struct {
		unreadable bool
		want       []string
	}{
		{true, []string{"5060 > ip", "all? > ip"}},
		{true, []string{"5060 > ip", "all? > ip"}},
		{false, []string{"5060 > ip"}},
	} {
		userrules.FailToRead(r.Reader, "ip fw", step.unreadable)
		got := read(t, r)
		if diff := cmp.Diff(step.want, got.forwards); diff != "" {
			t.Error(diff)
		}
		all, _, err := r.read()
		check(t, err)
		named := slices.ContainsFunc(all, func(f userrules.Forward) bool { return strings.Contains(f.Text, "ip fw pre") && f.Unknown && f.Unread })
		if named != step.unreadable {
			t.Errorf("unreadable %v, and that is said: %v", step.unreadable, named)
		}
	}
}
