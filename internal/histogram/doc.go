// Package histogram counts durations for quantiles that are exact to a hundredth, in fixed
// memory.
package histogram
