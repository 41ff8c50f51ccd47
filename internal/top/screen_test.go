package top

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/gdamore/tcell/v3"
	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/control"
)

// status is that of a daemon that works.
var status = control.Status{
	Outside: []string{"wan0"}, Subnets: []control.Subnet{{Prefix: netip.MustParsePrefix("10.47.0.0/16"), Carried: control.Carried{By: "expect"}}},
	Permissions: control.Permissions{Standing: 40, Refused: 2, Waiting: 1, Limit: 65536}, Flows: 55,
}

// modelOf returns a model that was told of ps.
func modelOf(t *testing.T, width, height int, ps []control.Permission) *model {
	t.Helper()
	m := &model{next: request{order: order{column: "INT"}}}
	m.resize(width, height)
	m.told(t, ps)
	return m
}

// told brings the model what it wants to show.
func (m *model) told(t *testing.T, ps []control.Permission) {
	t.Helper()
	p := read(t, m.next, ps)
	p.at = now
	m.accept(answer{status: status, page: p})
}

// text returns the lines of the screen without styles and trailing spaces.
func (m *model) text() (all []string) {
	for _, l := range m.lines(now.Add(12 * time.Second)) {
		var b strings.Builder
		for _, p := range l {
			b.WriteString(p.text)
		}
		all = append(all, strings.TrimRight(b.String(), " "))
	}
	return all
}

// Fails when the screen does not begin with the verdict and the totals, shows other columns
// than "list", or does not say which rows these are.
func TestScreen(t *testing.T) {
	ps := []control.Permission{permission(1), permission(2), permission(300)}
	ps[1].State, ps[1].Reason, ps[1].Since, ps[1].Expires = "refused", "table_full", time.Time{}, time.Time{}
	m := modelOf(t, 120, 8, ps)
	if err := m.next.filter.SetHost("10.47.0.0/16"); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"works",
		"40 standing of at most 65536, 2 refused, 1 waiting, 55 flows",
		"INT↑             EXT                PEER         STATE     FLOWS  CHILDREN  AGE    EXPIRES  REASON",
		"10.47.0.1:5060   198.51.100.1:5060  203.0.113.5  standing  1      1         1s     1s       -",
		"10.47.0.2:5060   198.51.100.1:5060  203.0.113.5  refused   2      2         -      -        kernel table is full",
		"10.47.1.44:5060  198.51.100.1:5060  203.0.113.5  standing  6      0         5m00s  0s       -",
		"",
		"1-3 of 3, host 10.47.0.0/16  q quit, < > sort by another column, r reverse, arrows PgUp PgDn Home End scroll",
	}
	if diff := cmp.Diff(want, m.text()); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	m.accept(answer{err: errors.New("no conenatd runs in this network namespace")})
	lines := m.text()
	if lines[0] != "no conenatd runs in this network namespace" || !strings.HasPrefix(lines[1], "12s ago: 40 standing") || !strings.HasPrefix(lines[3], "10.47.0.1:") {
		t.Errorf("without a daemon: %q", lines)
	}
	m.told(t, nil)
	if lines = m.text(); lines[0] != "works" || !strings.HasPrefix(lines[7], "0 of 0, ") || lines[3] != "" {
		t.Errorf("a daemon without permissions: %q", lines)
	}
}

// Fails when a screen of any size panics, has more or wider lines than fit, or hides the
// column that sorts although that fits, or half a column, which looks like a smaller number.
func TestAnySizeOfScreen(t *testing.T) {
	ps := permissions(50)
	m := modelOf(t, 0, 0, ps)
	names := m.page.columns
	for _, c := range names {
		m.next.order = order{column: c.Name}
		for width := range 130 {
			for height := range 12 {
				m.resize(width, height)
				m.told(t, ps)
				lines := m.text()
				if len(lines) > height {
					t.Fatalf("%dx%d: %q", width, height, lines)
				}
				for _, l := range lines {
					if utf8.RuneCountInString(l) > width {
						t.Fatalf("%dx%d: %q", width, height, lines)
					}
				}
				if height < head+1 || width < 40 {
					continue
				}
				shown := strings.Fields(lines[2])
				if !slices.ContainsFunc(shown, func(s string) bool { return strings.Trim(s, "<>↑↓") == c.Name }) {
					t.Fatalf("%dx%d by %s: %q", width, height, c.Name, lines)
				}
				for _, s := range shown {
					s = strings.Trim(s, "<>↑↓")
					if s != "" && !slices.ContainsFunc(names, func(c control.Column) bool { return c.Name == s }) {
						t.Fatalf("%dx%d: half a column: %q", width, height, lines)
					}
				}
			}
		}
	}
}

// Fails when a key does not do what the manual says.
func TestKeys(t *testing.T) {
	ps := permissions(100)
	m := modelOf(t, 100, 14, ps) // 10 rows
	for _, step := range []struct {
		key  tcell.Key
		text string
		want string // position and order
		host int    // the first on the screen
	}{
		{tcell.KeyDown, "", "2-11 of 100 INT↑", 1},
		{tcell.KeyPgDn, "", "12-21 of 100 INT↑", 11},
		{tcell.KeyRune, "j", "13-22 of 100 INT↑", 12},
		{tcell.KeyRune, "k", "12-21 of 100 INT↑", 11},
		{tcell.KeyPgUp, "", "2-11 of 100 INT↑", 1},
		{tcell.KeyRune, "b", "1-10 of 100 INT↑", 0},
		{tcell.KeyUp, "", "1-10 of 100 INT↑", 0},
		{tcell.KeyEnd, "", "91-100 of 100 INT↑", 90},
		{tcell.KeyDown, "", "91-100 of 100 INT↑", 90},
		{tcell.KeyRune, "b", "81-90 of 100 INT↑", 80},
		{tcell.KeyRune, " ", "91-100 of 100 INT↑", 90},
		{tcell.KeyHome, "", "1-10 of 100 INT↑", 0},
		{tcell.KeyRune, "r", "1-10 of 100 INT↓", 99},
		{tcell.KeyLeft, "", "1-10 of 100 EXPIRES↑", 0},
		{tcell.KeyRune, "<", "1-10 of 100 AGE↑", 0},
		{tcell.KeyRune, "<", "1-10 of 100 CHILDREN↓", 2},
		{tcell.KeyRune, "<", "1-10 of 100 FLOWS↓", 6},
		{tcell.KeyRune, "r", "1-10 of 100 FLOWS↑", 0},
		{tcell.KeyRight, "", "1-10 of 100 CHILDREN↓", 2},
		{tcell.KeyRune, ">", "1-10 of 100 AGE↑", 0},
		{tcell.KeyRune, "x", "1-10 of 100 AGE↑", 0},
	} {
		changed, quit := m.press(step.key, step.text)
		if changed {
			m.told(t, ps)
		}
		lines := m.text()
		order := ""
		for _, f := range strings.Fields(lines[2]) {
			if strings.ContainsAny(f, "↑↓") {
				order = f
			}
		}
		position, _, _ := strings.Cut(lines[len(lines)-1], "  ")
		if got := position + " " + order; got != step.want || quit || m.shown()[0].Int != permission(step.host).Int {
			t.Fatalf("%v %q: %s, first %v, want %s, %v", step.key, step.text, got, m.shown()[0].Int, step.want, permission(step.host).Int)
		}
	}
	for key, text := range map[tcell.Key]string{tcell.KeyRune: "q", tcell.KeyCtrlC: ""} {
		if _, quit := m.press(key, text); !quit {
			t.Errorf("%v %q does not quit", key, text)
		}
	}
}

// Fails when keys that come while a look is under way are lost once its answer comes.
func TestAnswerToAnEarlierRequest(t *testing.T) {
	ps := permissions(100)
	m := modelOf(t, 100, 14, ps)
	asked := m.next
	m.press(tcell.KeyPgDn, "")
	m.accept(answer{status: status, page: read(t, asked, ps)})
	if got := m.shown()[0].Int; got != permission(10).Int {
		t.Errorf("begins at %v", got)
	}
	m.press(tcell.KeyRune, ">")
	m.press(tcell.KeyRune, ">")
	m.accept(answer{status: status, page: read(t, asked, ps)})
	if lines := m.text(); !strings.HasPrefix(lines[2], "INT↑") || m.next.order.column != "PEER" {
		t.Errorf("shows %q, next by %s", lines[2], m.next.order.column)
	}
}
