package main

import (
	"errors"
	"fmt"
	"io"
	"runtime"
	"time"
)

// A cell is one thing that is measured in a turn.
type cell struct {
	name string
	// packets is how many packets run sends.
	packets func(g *gateway) int
	// run sends packets through the gateway and returns the cost of one. Packets that did not
	// arrive are an errStray.
	run func(g *gateway) (time.Duration, error)
}

// errStray says that packets did not arrive where they should.
var errStray = errors.New("packets went astray")

// A race compares arms with a base.
type race struct {
	cells []cell
	// begin and end surround the turns of an arm in a quad. For the base each of its turns is
	// surrounded, so that nobody listens to it while others have their turns.
	begin, end func(g *gateway) error
	// clear removes what turns leave behind, at the end of a quad.
	clear func(g *gateway) error

	rounds    int
	disturbed bool         // measure although somebody listens
	look      func() error // an errDisturbed while somebody listens
	patience  time.Duration
	stopped   func() error // an error after an interrupt
	log       io.Writer
}

// A result has the samples of one arm and cell, one for each quad that was not void.
type result struct {
	arm, cell string
	ratios    []float64 // cost of the base through cost of the arm: throughput against the base
	costs     []float64 // of the arm, in ns for a packet
	base      []float64 // of the base
	used      []float64 // CPU time of the program in the gateway, in ns for a packet

	value *interval // in the place of ratios, if it was calculated from other results
}

// measured reports whether there is a value.
func (x *result) measured() bool { return x != nil && (len(x.ratios) > 0 || x.value != nil) }

func (x *result) interval() interval {
	if x.value != nil {
		return *x.value
	}
	return intervalOf(x.ratios)
}

// errVoid says that too many quads were void.
var errVoid = errors.New("too many rounds were void")

// against runs quads of each arm against the base, in turns. Results are in the order of arms,
// and for each of them in the order of cells.
func (r *race) against(base *gateway, arms []*gateway) ([]*result, error) {
	results := make([]*result, 0, len(arms)*len(r.cells))
	for _, g := range arms {
		for _, c := range r.cells {
			results = append(results, &result{arm: g.name, cell: c.name})
		}
	}
	if err := r.check(); err != nil {
		return nil, err
	}
	void := 0
	for round := range r.rounds {
		runtime.GC()
		for k := range arms {
			i := (k + round) % len(arms)
			for {
				err := r.quad(base, arms[i], results[i*len(r.cells):][:len(r.cells)])
				if err == nil {
					break
				}
				if !errors.Is(err, errStray) && !errors.Is(err, errDisturbed) {
					return nil, err
				}
				if void++; void > max(1, r.rounds*len(arms)/4) {
					return nil, fmt.Errorf("%w: %w", errVoid, err)
				}
				fmt.Fprintf(r.log, "  void: %v\n", err)
				if err := r.await(); err != nil {
					return nil, err
				}
			}
		}
	}
	return results, nil
}

// quad measures A B B A. It adds nothing to the results if it is void.
func (r *race) quad(base, g *gateway, results []*result) error {
	base.limit = g.limit
	var a, b turn
	alone := func() error {
		return inOrder(func() error { return r.begin(base) }, func() error { return a.take(r.cells, base) }, func() error { return r.end(base) })
	}
	err := inOrder(
		alone,
		func() error { return r.begin(g) },
		func() error { return b.take(r.cells, g) },
		func() error { return b.take(r.cells, g) },
		func() error { return r.end(g) },
		alone,
		func() error { return r.clear(base) },
		func() error { return r.clear(g) },
	)
	if err = errors.Join(err, a.stray, b.stray); err != nil {
		return err
	}
	if err := r.check(); err != nil {
		return err
	}
	for i, x := range results {
		x.add(float64(a.costs[i])/2, float64(b.costs[i])/2, float64(b.used[i])/2)
	}
	return nil
}

func (x *result) add(base, cost, used float64) {
	x.base, x.costs = append(x.base, base), append(x.costs, cost)
	x.ratios, x.used = append(x.ratios, base/cost), append(x.used, used)
}

// inOrder calls functions until one fails.
func inOrder(all ...func() error) error {
	for _, f := range all {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

// A turn adds up what the turns of an arm in a quad cost, by cell.
type turn struct {
	costs, used []time.Duration
	stray       error
}

// take lets a gateway have a turn.
func (t *turn) take(cells []cell, g *gateway) error {
	if t.costs == nil {
		t.costs, t.used = make([]time.Duration, len(cells)), make([]time.Duration, len(cells))
	}
	g.turns++
	for i, c := range cells {
		before, err := g.used()
		if err != nil {
			return err
		}
		cost, err := c.run(g)
		if errors.Is(err, errStray) {
			t.stray, err = fmt.Errorf("%s, %s: %w", g.name, c.name, err), nil
		}
		after, busy := g.used()
		if err := errors.Join(err, busy); err != nil {
			return fmt.Errorf("%s, %s: %w", g.name, c.name, err)
		}
		t.costs[i] += cost
		t.used[i] += (after - before) / time.Duration(max(1, c.packets(g)))
	}
	return nil
}

// check refuses to measure while somebody else listens, and after an interrupt.
func (r *race) check() error {
	if err := r.stopped(); err != nil {
		return err
	}
	if r.disturbed {
		return nil
	}
	return r.look()
}

// await waits until nobody else listens any more.
func (r *race) await() error {
	for end := time.Now().Add(r.patience); ; time.Sleep(time.Second) {
		err := r.check()
		if !errors.Is(err, errDisturbed) || time.Now().After(end) {
			return err
		}
	}
}
