package top

import (
	"cmp"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

// An order says by which column permissions are sorted.
type order struct {
	column   string
	reversed bool
}

// descends lists the columns whose largest values come first, unless the order is reversed.
var descends = []string{"FLOWS", "CHILDREN"}

// down reports whether the largest values come first.
func (o order) down() bool { return slices.Contains(descends, o.column) != o.reversed }

// compare returns the order as a function. Permissions that are alike in the column are in the
// order of "list".
func (o order) compare() func(a, b *control.Permission) int {
	i := slices.IndexFunc(control.Columns, func(c control.Column) bool { return c.Name == o.column })
	by, down := control.Columns[i].Compare, o.down()
	return func(a, b *control.Permission) int {
		c := by(a, b)
		if down {
			c = -c
		}
		return cmp.Or(c, control.ComparePermissions(*a, *b))
	}
}

// A request says which part of the sorted list to show.
type request struct {
	order  order
	filter control.Filter
	// from is where the part begins: at this permission, or at the next if it is gone. nil is
	// the beginning of the list.
	from   *control.Permission
	end    bool // the last rows instead
	height int  // rows that the screen has
}

// around is how many screens of rows a page has before the requested place, and from it on. By
// so many the user can scroll before the daemon must answer.
const around = 4

// A page is a part of the sorted list, so that its memory does not depend on the length of the
// list.
type page struct {
	order   order
	columns []control.Column // those that some permission of the list uses
	rows    []control.Permission
	before  int // permissions of the list before rows
	total   int // permissions of the list
	at      time.Time
}

// read makes the page from the list, which each passes one by one.
func (r request) read(each func(func(control.Permission) error) error) (page, error) {
	compare := r.order.compare()
	above := nearest{keep: around * r.height, compare: func(a, b *control.Permission) int { return compare(b, a) }}
	below := nearest{keep: around * r.height, compare: compare}
	used := make([]bool, len(control.Columns))
	err := each(func(p control.Permission) error {
		if !r.filter.Selects(&p) {
			return nil
		}
		for i, c := range control.Columns {
			used[i] = used[i] || c.Used == nil || c.Used(&p)
		}
		if r.end || r.from != nil && compare(&p, r.from) < 0 {
			above.add(p)
		} else {
			below.add(p)
		}
		return nil
	})
	if err != nil {
		return page{}, err
	}
	before, after := above.close(), below.close()
	slices.Reverse(before)
	p := page{
		order: r.order, rows: append(before, after...),
		before: above.seen - len(before), total: above.seen + below.seen,
	}
	for i, c := range control.Columns {
		if used[i] || c.Used == nil {
			p.columns = append(p.columns, c)
		}
	}
	return p, nil
}

// find returns the index of the first row on a screen that shows what r wants. If the page has
// as many rows, the screen is full.
func (p *page) find(r request) (top int) {
	switch {
	case r.order != p.order: // of another time
	case r.end:
		top = len(p.rows)
	case r.from != nil:
		compare := r.order.compare()
		top, _ = slices.BinarySearchFunc(p.rows, r.from, func(row control.Permission, from *control.Permission) int { return compare(&row, from) })
	}
	return max(0, min(top, len(p.rows)-r.height))
}

// nearest keeps the first permissions of an order.
type nearest struct {
	keep    int
	compare func(a, b *control.Permission) int
	rows    []control.Permission
	sorted  int // the first of rows are sorted, and there are no others before the last of them
	seen    int
}

func (n *nearest) add(p control.Permission) {
	n.seen++
	if n.sorted == n.keep && (n.keep == 0 || n.compare(&p, &n.rows[n.keep-1]) > 0) {
		return
	}
	if n.rows = append(n.rows, p); len(n.rows) >= 2*n.keep {
		n.trim()
	}
}

// trim sorts rows and keeps the first.
func (n *nearest) trim() {
	slices.SortFunc(n.rows, func(a, b control.Permission) int { return n.compare(&a, &b) })
	n.rows = n.rows[:min(n.keep, len(n.rows))]
	n.sorted = len(n.rows)
}

// close returns the permissions in their order.
func (n *nearest) close() []control.Permission {
	n.trim()
	return n.rows
}
