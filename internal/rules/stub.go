//go:build 386 || arm || mips || mipsle

package rules

import (
	"net/netip"
	"runtime"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

var errNoBuild = &UnsupportedError{
	Feature: FeatureTable,
	Mend:    "conenatd for " + runtime.GOARCH + " is built without it",
}

// Tables are never made on this system, nor is what writes their elements.
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

// LegacyChanged returns an *UnsupportedError.
func (*Tables) LegacyChanged() (bool, error) { return false, errNoBuild }

// Owned returns false.
func (*Tables) Owned() bool { return false }

// Rivals returns an *UnsupportedError.
func (*Tables) Rivals() ([]string, error) { return nil, errNoBuild }

// NewMap returns nil.
func (*Tables) NewMap(*MapConfig) *elements.Map { return nil }

// NewMappings returns nil.
func (*Tables) NewMappings(*MappingConfig) *elements.Mappings { return nil }

// Counters returns an *UnsupportedError.
func (*Tables) Counters() (Counters, error) { return Counters{}, errNoBuild }

// NewUnsure returns nil.
func (*Tables) NewUnsure() *elements.Unsure { return nil }

// Remove returns an *UnsupportedError.
func (*Tables) Remove() error { return errNoBuild }

// Close does nothing.
func (*Tables) Close() error { return nil }

// Forwards returns an *UnsupportedError.
func Forwards(int, []Link) ([]Forward, error) { return nil, errNoBuild }

// Children returns an *UnsupportedError.
func Children(int, []Link, []netip.Prefix) ([]ChildVerdicts, error) { return nil, errNoBuild }

// PeerGroups returns an *UnsupportedError.
func (*Tables) PeerGroups() ([]netip.Prefix, error) { return nil, errNoBuild }

// PortChoosers says that this build reads no rules.
func PortChoosers(int) ([]string, error) { return nil, errNoBuild }

// Uplinks says that no rule names a link.
func Uplinks(int, []LAN) ([]string, error) { return nil, nil }

// FixedSources says that nothing is known.
func FixedSources(int) (addrs []AddrRange, unknown bool, err error) { return nil, true, errNoBuild }

// Has returns false.
func (r AddrRange) Has(netip.Addr) bool { return false }

// A ForwardReader reads nothing on this system.
type ForwardReader struct{}

// NewForwardReader returns nil.
func (*Tables) NewForwardReader() *ForwardReader { return nil }

// Read returns an *UnsupportedError.
func (*ForwardReader) Read([]Link) ([]Forward, bool, error) { return nil, false, errNoBuild }

// Hidden returns true.
func (*ForwardReader) Hidden() bool { return true }

// Close does nothing.
func (*ForwardReader) Close() error { return nil }
