//go:build 386 || arm || mips || mipsle

package rules

import "runtime"

var errNoBuild = &UnsupportedError{
	Feature: FeatureTable,
	Mend:    "conenatd for " + runtime.GOARCH + " is built without it",
}

// A Table is never made on this system.
type Table struct{}

// Open returns an *UnsupportedError.
func Open(Config) (*Table, error) { return nil, errNoBuild }

// Missing returns the features that the kernel lacks.
func (*Table) Missing() []*UnsupportedError { return nil }

// Set returns an *UnsupportedError.
func (*Table) Set(Desired) error { return errNoBuild }

// Counters returns an *UnsupportedError.
func (*Table) Counters() (Counters, error) { return Counters{}, errNoBuild }

// Remove returns an *UnsupportedError.
func (*Table) Remove() error { return errNoBuild }

// Close does nothing.
func (*Table) Close() error { return nil }

// Forwards returns an *UnsupportedError.
func Forwards(int, []Link) ([]Forward, error) { return nil, errNoBuild }
