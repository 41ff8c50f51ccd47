package control

import (
	"encoding/csv"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// Fails when a filter selects too much or too little.
func TestFilters(t *testing.T) {
	group := standing("10.47.12.20:3074", "198.51.100.1:3074", "192.0.2.0")
	group.Peers, group.State = netip.MustParsePrefix("192.0.2.0/24"), "waiting"
	anybody := standing("[2001:db8::9]:1", "[2001:db8::9]:1", "::")
	anybody.Peers = netip.MustParsePrefix("::/0")
	all := []Permission{proxy, group, anybody} // 10.47.11.109 and 80.80.80.80; 10.47.12.20 and 192.0.2.0/24; 2001:db8::9 and anybody
	for _, tt := range []struct {
		set  func(f *Filter) error
		want []int
	}{
		{func(*Filter) error { return nil }, []int{0, 1, 2}},
		{func(f *Filter) error { return f.SetHost("10.47.12.20") }, []int{1}},
		{func(f *Filter) error { return f.SetHost("10.47.0.0/16") }, []int{0, 1}},
		{func(f *Filter) error { return f.SetHost("::ffff:10.47.12.20") }, []int{1}},
		{func(f *Filter) error { return f.SetPeer("192.0.2.77") }, []int{1}},
		{func(f *Filter) error { return f.SetPeer("192.0.0.0/8") }, []int{1}},
		{func(f *Filter) error { return f.SetPeer("2001:db8:5::5") }, []int{2}},
		{func(f *Filter) error { return f.SetSubnet("10.47.11.0/24") }, []int{0}},
		{func(f *Filter) error { return f.SetState("waiting") }, []int{1}},
		{func(f *Filter) error { _ = f.SetState("waiting"); return f.SetHost("10.47.11.109") }, nil},
	} {
		var f Filter
		if err := tt.set(&f); err != nil {
			t.Fatal(err)
		}
		var got []int
		for i := range all {
			if f.Selects(&all[i]) {
				got = append(got, i)
			}
		}
		if !slices.Equal(got, tt.want) {
			t.Errorf("%+v selects %v, want %v", f, got, tt.want)
		}
	}
	var f Filter
	for want, err := range map[string]error{
		`host "x": expected`: f.SetHost("x"), `peer "": expected`: f.SetPeer(""), `subnet "10.0.0.1": expected`: f.SetSubnet("10.0.0.1"),
		`host "10.47.11.5/24": expected a prefix without host bits; did you mean 10.47.11.0/24, or 10.47.11.5?`: f.SetHost("10.47.11.5/24"),
		`host "fe80::1%lan0": expected`: f.SetHost("fe80::1%lan0"), `peer "::ffff:10.0.0.0/104": expected`: f.SetPeer("::ffff:10.0.0.0/104"),
		`state "up": expected standing`: f.SetState("up"),
	} {
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%v, want %q", err, want)
		}
	}
}

// Fails when a member of a permission has no column, or a value is in another one.
func TestCSV(t *testing.T) {
	var members []string
	for i := range reflect.TypeFor[Permission]().NumField() {
		name, _, _ := strings.Cut(reflect.TypeFor[Permission]().Field(i).Tag.Get("json"), ",")
		members = append(members, name)
	}
	if !slices.Equal(members, csvHeader) {
		t.Errorf("columns %q, members %q", csvHeader, members)
	}
	p := proxy
	p.Peers, p.Zone, p.Reason, p.Flows, p.Children, p.Answered = netip.MustParsePrefix("80.80.80.0/24"), 7, "idle", 1, 2, 3
	var b strings.Builder
	c := NewCSVWriter(&b)
	if err := c.Write(p); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(strings.NewReader(b.String())).ReadAll()
	want := []string{
		"10.47.11.109:5060", "198.51.100.1:5060", "80.80.80.80", "80.80.80.0/24", "7", "standing", "idle", p.Backend, "1", "2", "3",
		p.Since.Format("2006-01-02T15:04:05.999999999Z07:00"), p.Expires.Format("2006-01-02T15:04:05.999999999Z07:00"),
	}
	if err != nil || len(rows) != 2 || !slices.Equal(rows[1], want) {
		t.Errorf("%v\n%q\nwant %q", err, rows, want)
	}
}
