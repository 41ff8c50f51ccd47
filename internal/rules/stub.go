//go:build 386 || arm || mips || mipsle

package rules

import (
	"net/netip"
	"runtime"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// MarkerChain is a chain of each of our tables.
const MarkerChain = "made_by_conenatd"

// MapPriority is the priority of a chain that does not exist on this system.
const MapPriority = -199

var errNoBuild = &UnsupportedError{
	Feature: FeatureTable,
	Mend:    "conenatd for " + runtime.GOARCH + " is built without it",
}

// Tables are never made on this system, nor are the values that write their elements.
type Tables struct{}

// Names returns an *UnsupportedError.
func Names(int) ([]string, error) { return nil, errNoBuild }

// Text returns an *UnsupportedError.
func Text(string, Desired) (string, error) { return "", errNoBuild }

// Open returns an *UnsupportedError.
func Open(Config) (*Tables, error) { return nil, errNoBuild }

// Missing returns the features that the kernel lacks.
func (*Tables) Missing() []*UnsupportedError { return nil }

// Set returns an *UnsupportedError.
func (*Tables) Set(Desired) (bool, error) { return false, errNoBuild }

// Lacks returns true.
func (*Tables) Lacks(Feature) bool { return true }

// Changed returns an *UnsupportedError.
func (*Tables) Changed() (bool, error) { return false, errNoBuild }

// OthersChanges returns an *UnsupportedError.
func (*Tables) OthersChanges(*nfnl.Conn) (uint32, error) { return 0, errNoBuild }

// Leads returns false.
func (*Tables) Leads() bool { return false }

// ZonedAddrs returns an *UnsupportedError.
func (*Tables) ZonedAddrs() ([]netip.Addr, error) { return nil, errNoBuild }

// Owned returns false.
func (*Tables) Owned() bool { return false }

// NewMap returns nil.
func (*Tables) NewMap(*MapConfig) *elements.Map { return nil }

// NewMappings returns nil.
func (*Tables) NewMappings(*MappingConfig) *elements.Mappings { return nil }

// Counters returns an *UnsupportedError.
func (*Tables) Counters() (Counters, error) { return Counters{}, errNoBuild }

// NewUnsure returns nil.
func (*Tables) NewUnsure() *elements.Unsure { return nil }

// NewRevoked returns nil.
func (*Tables) NewRevoked() *elements.Revoked { return nil }

// Remove returns an *UnsupportedError.
func (*Tables) Remove() error { return errNoBuild }

// Close does nothing.
func (*Tables) Close() error { return nil }

// PeerGroups returns an *UnsupportedError.
func (*Tables) PeerGroups() ([]netip.Prefix, error) { return nil, errNoBuild }
