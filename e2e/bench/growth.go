package main

import "math"

// The columns of table f.
const (
	growthStart  = "start, until all are adopted"
	growthMemory = "resident memory"
)

// growth is table f: how costs grow with size, from the other tables of the run.
func growth(o *options, measured []*table) *table {
	t := &table{
		key: "f", title: "Exponents of growth", absolute: true,
		about: "The exponent of a power law between the smallest and the largest number of permissions or flows of this run: " +
			"0 is a cost that does not depend on it, 1 is a total that is proportional to it. Intervals are from the ends of " +
			"the intervals of both sizes, so they hold more often than 95 %. Costs of packets are against the base of their table.",
	}
	for _, from := range measured {
		switch from.key {
		case "a":
			for _, kind := range []string{twoWay, oneWay} {
				t.grow(from, o.sizes, kind, func(size int) string { return streamColumn(kind, 64, size) }, goal{}, true)
			}
		case "c", "c2":
			t.grow(from, o.sizes, from.title, childColumn, goal{bound: 0.05, atMost: true}, true)
		case "e":
			t.grow(from, o.startFlows, growthStart, func(n int) string { return startColumn(startAdopted, n) }, goal{bound: 1.05, atMost: true}, false)
			t.grow(from, o.startFlows, growthMemory, func(n int) string { return startColumn(startMemory, n) }, goal{bound: 1.05, atMost: true}, false)
		}
	}
	return t
}

// grow adds a column with the growth of each arm that was measured at both ends of sizes.
// inverse says that the values are packets a second instead of costs.
func (t *table) grow(from *table, sizes []int, column string, of func(size int) string, g goal, inverse bool) {
	small, large := sizes[0], sizes[len(sizes)-1]
	if small >= large {
		return
	}
	t.columns = append(t.columns, column)
	for _, r := range from.rows {
		a, b := r.cells[of(small)], r.cells[of(large)]
		if !a.measured() || !b.measured() {
			continue
		}
		x, y := a.interval(), b.interval()
		if inverse {
			x, y = x.inverse(), y.inverse()
		}
		e := exponent(x, y, small, large)
		t.add(&result{arm: r.arm, cell: column, value: &e})
		if g != (goal{}) {
			t.goals = append(t.goals, wanted{column, r.arm, "", g})
		}
	}
}

// exponent returns the exponent of growth of a cost from size a to size b.
func exponent(small, large interval, a, b int) interval {
	of := func(s, l float64) float64 { return math.Log(l/s) / math.Log(float64(b)/float64(a)) }
	return interval{
		Median: of(small.Median, large.Median), Low: of(small.High, large.Low), High: of(small.Low, large.High),
		Sound: small.Sound && large.Sound,
	}
}

func (r interval) inverse() interval { return interval{1 / r.Median, 1 / r.High, 1 / r.Low, r.Sound} }
