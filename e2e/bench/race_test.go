package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"testing"
	"time"
)

// A raceOf arms without a kernel. In quad number bad, counted from 1, what goes wrong is done.
func raceOf(bad int, stray, listener bool) (*race, *[]string) {
	var turns []string
	quad := func() int { return (len(turns) + 3) / 4 }
	cost := map[string]time.Duration{stock: 1000, "slow": 2000, "fast": 500}
	r := (&options{rounds: 6, log: io.Discard, stopped: func() error { return nil }}).race([]cell{{
		name:    "packets",
		packets: func(*gateway) int { return 1 },
		run: func(g *gateway) (time.Duration, error) {
			turns = append(turns, g.name)
			if stray && quad() == bad {
				return 0, fmt.Errorf("%w: one", errStray)
			}
			return cost[g.name], nil
		},
	}})
	seen := false
	r.look = func() error {
		if listener && quad() == bad && len(turns)%4 == 0 && !seen {
			seen = true
			return fmt.Errorf("%w: one", errDisturbed)
		}
		return nil
	}
	return r, &turns
}

func fakes(names ...string) (all []*gateway) {
	for _, name := range names {
		all = append(all, &gateway{arm: arm{name: name}})
	}
	return all
}

// Fails when turns are not A B B A, a ratio is the wrong way round, or arms do not take turns.
func TestArmsTakeTurns(t *testing.T) {
	r, turns := raceOf(0, false, false)
	results, err := r.against(fakes(stock)[0], fakes("slow", "fast"))
	if err != nil {
		t.Fatal(err)
	}
	for i, want := range []float64{0.5, 2} {
		if got := intervalOf(results[i].ratios); got != (interval{want, want, want, true}) || len(results[i].ratios) != r.rounds {
			t.Errorf("%s: %v of %d quads", results[i].arm, got, len(results[i].ratios))
		}
	}
	for i, want := range []string{"slow", "fast", "fast", "slow"} {
		if quad := (*turns)[4*i:][:4]; !slices.Equal(quad, []string{stock, want, want, stock}) {
			t.Errorf("quad %d is %q", i, quad)
		}
	}
}

// Fails when a quad counts in which packets went astray or somebody listened.
func TestVoidQuadIsRepeated(t *testing.T) {
	for _, stray := range []bool{true, false} {
		r, turns := raceOf(3, stray, !stray)
		results, err := r.against(fakes(stock)[0], fakes("slow"))
		if err != nil {
			t.Fatal(err)
		}
		if n := len(*turns); n != 4*(r.rounds+1) || len(results[0].ratios) != r.rounds || slices.Min(results[0].ratios) != 0.5 {
			t.Errorf("stray: %v: %d turns, ratios %v", stray, n, results[0].ratios)
		}
	}
}

// Fails when a race goes on for ever although somebody keeps listening, or packets never come.
func TestRaceGivesUp(t *testing.T) {
	r, _ := raceOf(0, false, false)
	r.patience, r.look = 0, func() error { return errDisturbed }
	if _, err := r.against(fakes(stock)[0], fakes("slow")); !errors.Is(err, errDisturbed) {
		t.Errorf("somebody listens: %v", err)
	}
	r, _ = raceOf(0, false, false)
	r.cells[0].run = func(*gateway) (time.Duration, error) { return 0, errStray }
	if _, err := r.against(fakes(stock)[0], fakes("slow")); !errors.Is(err, errVoid) {
		t.Errorf("nothing arrives: %v", err)
	}
}
