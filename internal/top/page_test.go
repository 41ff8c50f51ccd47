package top

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/conenatd/conenatd/internal/control"
)

var now = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// permission returns the i-th of many different permissions.
func permission(i int) control.Permission {
	host := netip.AddrFrom4([4]byte{10, 47, byte(i >> 8), byte(i)})
	return control.Permission{
		Int: netip.AddrPortFrom(host, 5060), Ext: netip.MustParseAddrPort("198.51.100.1:5060"), Peer: netip.MustParseAddr("203.0.113.5"),
		State: "standing", Flows: i % 7, Children: i % 3,
		Since: now.Add(-time.Duration(i) * time.Second), Expires: now.Add(time.Duration(i%300) * time.Second),
	}
}

// permissions returns n of them in a random order.
func permissions(n int) []control.Permission {
	var ps []control.Permission
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(n) {
		ps = append(ps, permission(i))
	}
	return ps
}

// read makes the page of ps that r wants.
func read(t *testing.T, r request, ps []control.Permission) page {
	t.Helper()
	p, err := r.read(func(f func(control.Permission) error) error {
		for i := range ps {
			if err := f(ps[i]); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// Fails when a page has other rows than the sorted list has there, in any order and at any
// place, when it does not know where in the list they are, and when it keeps more
// rows than it may.
func TestPageIsAPartOfTheSortedList(t *testing.T) {
	const height = 20
	for _, n := range []int{0, 1, height, 41, 1000} {
		ps := permissions(n)
		for _, c := range control.Columns {
			for _, reversed := range []bool{false, true} {
				o := order{c.Name, reversed}
				compare := o.compare()
				sorted := slices.Clone(ps)
				slices.SortFunc(sorted, func(a, b control.Permission) int { return compare(&a, &b) })
				for _, from := range []int{0, 1, height - 1, n / 2, n - height, n - 1, n} {
					if from < 0 || from >= n && from > 0 && n == 0 {
						continue
					}
					r := request{order: o, height: height, end: from == n}
					if from > 0 && from < n {
						r.from = &sorted[from]
					}
					p := read(t, r, ps)
					what := fmt.Sprintf("%d of %d by %+v", from, n, o)
					top := p.before + p.find(r)
					if want := max(0, min(from, n-height)); top != want || p.total != n {
						t.Fatalf("%s: begins at %d of %d, want %d", what, top, p.total, want)
					}
					if diff := cmp.Diff(sorted[p.before:p.before+len(p.rows)], p.rows, cmpopts.EquateEmpty(), cmpopts.EquateComparable(netip.AddrPort{}, netip.Addr{}, netip.Prefix{})); diff != "" {
						t.Fatalf("%s (-want +got):\n%s", what, diff)
					}
					if len(p.rows) > 2*around*height || len(p.rows) < min(n, height) || cap(p.rows) > 6*around*height {
						t.Fatalf("%s: %d rows in memory of %d", what, len(p.rows), cap(p.rows))
					}
				}
			}
		}
	}
}

// Fails when a page does not begin at the next row once the row that it begins at is gone, and
// when rows that come before it move it.
func TestPageStaysAtItsRow(t *testing.T) {
	ps := permissions(200)
	from := permission(100)
	r := request{order: order{column: "INT"}, height: 10, from: &from}
	first := func(ps []control.Permission) netip.AddrPort {
		p := read(t, r, ps)
		return p.rows[p.find(r)].Int
	}
	if got := first(slices.Concat(permissions(100), ps)); got != from.Int {
		t.Errorf("after others came it begins at %v, want %v", got, from.Int)
	}
	gone := slices.DeleteFunc(slices.Clone(ps), func(p control.Permission) bool { return p.Int == from.Int })
	if got, want := first(gone), permission(101).Int; got != want {
		t.Errorf("without its row it begins at %v, want %v", got, want)
	}
}

// Fails when the natural order of a column is another than the manual says, and when it cannot
// be reversed.
func TestColumnsSort(t *testing.T) {
	few, many := permission(1), permission(2)
	few.Int, many.Int = many.Int, few.Int // so that the order of "list" is no help
	waiting := control.Permission{Int: few.Int, Ext: few.Ext, Peer: few.Peer, State: "waiting"}
	for column, want := range map[string][]control.Permission{
		"INT": {many, few}, "FLOWS": {many, few}, "CHILDREN": {many, few},
		"AGE": {few, many, waiting}, "EXPIRES": {few, many, waiting}, "STATE": {few, waiting},
	} {
		compare, reverse := order{column, false}.compare(), order{column, true}.compare()
		for i := range want[1:] {
			if a, b := &want[i], &want[i+1]; compare(a, b) >= 0 || reverse(a, b) <= 0 {
				t.Errorf("%s: %+v does not come before %+v", column, a, b)
			}
		}
	}
}

// Fails when the filter lets others through, and when a column that nobody uses is shown, or
// one that somebody far away in the list uses is not.
func TestPageHasWhatTheFilterSelects(t *testing.T) {
	ps := permissions(100)
	for i := range ps {
		if ps[i].Int == permission(99).Int {
			ps[i].State, ps[i].Reason = "refused", "table_full"
		}
	}
	r := request{order: order{column: "INT"}, height: 5}
	names := func() (all []string) {
		for _, c := range read(t, r, ps).columns {
			all = append(all, c.Name)
		}
		return all
	}
	if got := names(); !slices.Contains(got, "REASON") || slices.Contains(got, "ZONE") {
		t.Errorf("columns: %q", got)
	}
	for _, err := range []error{r.filter.SetSubnet("10.47.0.96/27"), r.filter.SetState("standing")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	if got := names(); slices.Contains(got, "REASON") {
		t.Errorf("columns: %q", got)
	}
	if p := read(t, r, ps); p.total != 3 || p.rows[0].Int != permission(96).Int {
		t.Errorf("%d permissions, the first is %v", p.total, p.rows[0].Int)
	}
}
