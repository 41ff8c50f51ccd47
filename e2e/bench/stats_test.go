package main

import (
	"math"
	"math/rand/v2"
	"testing"
)

// The ranks are those of tables for 95 % intervals of a median: of 9 samples the second and
// the eighth, of 12 the third and the tenth, of 20 the sixth and the fifteenth.
func TestIntervalHasTheRanksOfTheTables(t *testing.T) {
	for _, test := range []struct {
		n, low, high int
		sound        bool
	}{{1, 1, 1, false}, {5, 1, 5, false}, {6, 1, 6, true}, {8, 1, 8, true}, {9, 2, 8, true}, {12, 3, 10, true}, {20, 6, 15, true}} {
		samples := make([]float64, test.n)
		for i, at := range rand.Perm(test.n) {
			samples[at] = float64(i + 1)
		}
		got := intervalOf(samples)
		want := interval{float64(test.n+1) / 2, float64(test.low), float64(test.high), test.sound}
		if got != want {
			t.Errorf("%d samples: %v, want %v", test.n, got, want)
		}
	}
}

// Fails when an interval misses the true median more often than in one case of twenty. The
// generator has a fixed seed.
func TestIntervalHoldsTheTrueMedian(t *testing.T) {
	const trials, n = 4000, 12
	random := rand.New(rand.NewPCG(1, 2))
	missed := 0
	for range trials {
		var samples [n]float64
		for i := range samples {
			samples[i] = math.Exp(random.NormFloat64()) // the median is 1
		}
		if r := intervalOf(samples[:]); r.Low > 1 || r.High < 1 {
			missed++
		}
	}
	if share := float64(missed) / trials; share > 1-confidence || share < 0.02 {
		t.Errorf("%.3f of the intervals miss the median", share)
	}
}

// Fails when there is a verdict although the interval includes both answers, or the A/A ratio
// is as far from 1 as the ratio from its goal, or there are too few samples.
func TestVerdictNeedsOneAnswer(t *testing.T) {
	quiet, noisy := interval{1, 0.999, 1.001, true}, interval{1.01, 0.98, 1.03, true}
	for _, test := range []struct {
		goal     goal
		r, noise interval
		want     verdict
	}{
		{goal{bound: 0.97}, interval{0.98, 0.975, 0.99, true}, quiet, reached},
		{goal{bound: 0.97}, interval{0.98, 0.965, 0.99, true}, quiet, open},
		{goal{bound: 0.97}, interval{0.95, 0.94, 0.96, true}, quiet, missed},
		{goal{bound: 0.97}, interval{0.98, 0.975, 0.99, true}, noisy, open},
		{goal{bound: 0.97}, interval{0.95, 0.94, 0.96, true}, noisy, open},
		{goal{bound: 0.97}, interval{0.90, 0.89, 0.91, true}, noisy, missed},
		{goal{bound: 0.97}, interval{0.98, 0.975, 0.99, false}, quiet, few},
		{goal{bound: 0.97}, interval{0.98, 0.975, 0.99, true}, interval{1, 1, 1, false}, few},
		{goal{bound: 1.5, atMost: true}, interval{1.3, 1.2, 1.4, true}, quiet, reached},
		{goal{bound: 1.5, atMost: true}, interval{1.5, 1.4, 1.6, true}, quiet, open},
		{goal{bound: 1.5, atMost: true}, interval{1.7, 1.6, 1.8, true}, quiet, missed},
	} {
		if got := test.goal.judge(test.r, test.noise); got != test.want {
			t.Errorf("%v, seen %v, A/A %v: %s, want %s", test.goal, test.r, test.noise, got, test.want)
		}
	}
}
