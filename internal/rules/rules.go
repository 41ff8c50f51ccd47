package rules

import (
	"errors"
	"fmt"
)

// DefaultName is the name of our table.
const DefaultName = "conenat"

// Config tells Open where to work.
type Config struct {
	// NetNS is a file descriptor of the network namespace, 0 for the current.
	NetNS int
	// Name is the name of the table, DefaultName when it is empty.
	Name string
}

// Desired is what the table shall do. UDP packets with port 0 are dropped in
// any case.
type Desired struct {
	// OutsideLinks are the names of links, which need not exist. Packets from
	// other links meet neither the guard nor the cap.
	OutsideLinks []string
	// Guard drops new UDP packets to the gateway that no socket waits for.
	Guard bool
	// MaxChildren is how many flows at a time one peer may have to one outside
	// endpoint by way of an expectation. 0 means no cap.
	MaxChildren int
}

// Counters count the packets dropped since the table was made.
type Counters struct {
	GuardDrops, ChildDrops, PortZeroDrops uint64
}

// A Feature is something that a kernel may lack.
type Feature string

// The features. Without FeatureTable there is nothing at all.
const (
	FeatureTable       Feature = "nftables"
	FeatureGuard       Feature = "guard"
	FeatureMaxChildren Feature = "cap on children"
)

// An UnsupportedError says that the kernel, or this build, lacks a Feature.
type UnsupportedError struct {
	Feature Feature
	Mend    string // what would mend it
	Err     error  // what the kernel said; may be nil
}

func (e *UnsupportedError) Error() string {
	s := fmt.Sprintf("%s not supported: %s", e.Feature, e.Mend)
	if e.Err != nil {
		s += fmt.Sprintf(" (%v)", e.Err)
	}
	return s
}

// Unwrap returns what the kernel said.
func (e *UnsupportedError) Unwrap() error { return e.Err }

// ErrForeignTable says that a table of our name is there that conenatd did not
// make. It was not touched.
var ErrForeignTable = errors.New("it exists and conenatd did not make it: choose another name")

// ErrOwned says that another process, which lives, owns our table.
var ErrOwned = errors.New("another process owns it: is a second conenatd running?")
