package main

import (
	"fmt"
	"math"
	"slices"
)

// confidence is the least probability with which an interval holds the true median.
const confidence = 0.95

// An interval is a median and its confidence interval.
type interval struct {
	Median, Low, High float64
	// Sound says that there were enough samples for the confidence; otherwise Low and High
	// are the extremes.
	Sound bool
}

// intervalOf returns the median of samples, of which there must be one at least, and its
// confidence interval from order statistics. It assumes only that the samples are independent:
// the number of samples below the true median has the binomial distribution with p = 1/2
// (David and Nagaraja, Order Statistics, 7.1). Six samples are the least for 95 %.
func intervalOf(samples []float64) interval {
	s := slices.Sorted(slices.Values(samples))
	n := len(s)
	r := interval{Median: (s[(n-1)/2] + s[n/2]) / 2, Low: s[0], High: s[n-1]}
	// below is the probability that at most k of n samples are below the median.
	below, term := 0.0, math.Pow(0.5, float64(n))
	for k := range n / 2 {
		below += term
		if 1-2*below < confidence {
			break
		}
		r.Low, r.High, r.Sound = s[k], s[n-1-k], true
		term *= float64(n-k) / float64(k+1)
	}
	return r
}

// over divides samples pairwise.
func over(a, b []float64) []float64 {
	ratios := make([]float64, min(len(a), len(b)))
	for i := range ratios {
		ratios[i] = a[i] / b[i]
	}
	return ratios
}

func (r interval) String() string {
	s := fmt.Sprintf("%.3f (%.3f to %.3f)", r.Median, r.Low, r.High)
	if !r.Sound {
		s += "*"
	}
	return s
}

// A verdict says whether a goal is reached.
type verdict string

const (
	reached verdict = "reached"
	missed  verdict = "missed"
	open    verdict = "open: the interval includes both answers"
	few     verdict = "none: too few rounds"
)

// A goal is a bound on a ratio.
type goal struct {
	bound  float64
	atMost bool // otherwise at least
}

func (g goal) String() string {
	if g.atMost {
		return fmt.Sprintf("<= %g", g.bound)
	}
	return fmt.Sprintf(">= %g", g.bound)
}

// judge compares r with the goal. noise is the A/A ratio, which should be 1: r is taken to be
// uncertain by what noise may miss 1 by as well.
func (g goal) judge(r, noise interval) verdict {
	if !r.Sound || !noise.Sound {
		return few
	}
	doubt := max(math.Abs(noise.Low-1), math.Abs(noise.High-1))
	low, high := r.Low*(1-doubt), r.High*(1+doubt)
	if g.atMost {
		low, high = -high, -low
		g.bound = -g.bound
	}
	switch {
	case low >= g.bound:
		return reached
	case high < g.bound:
		return missed
	}
	return open
}
