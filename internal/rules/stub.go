//go:build 386 || arm || mips || mipsle

package rules

import (
	"net/netip"
	"runtime"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

var errNoBuild = &UnsupportedError{
	Feature: FeatureTable,
	Mend:    "conenatd for " + runtime.GOARCH + " is built without it",
}

// Tables are never made on this system, nor is a Map.
type Tables struct{}

// Names returns an *UnsupportedError.
func Names(int) ([]string, error) { return nil, errNoBuild }

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
func (*Tables) NewMap(*MapConfig) *Map { return nil }

// NewMappings returns nil.
func (*Tables) NewMappings(*MappingConfig) *Mappings { return nil }

// Counters returns an *UnsupportedError.
func (*Tables) Counters() (Counters, error) { return Counters{}, errNoBuild }

// A Direction is the source and the destination of a flow as it began.
type Direction struct{ Src, Dst cone.Endpoint }

// Unsure does nothing.
func (*Tables) Unsure(func(Direction)) error { return nil }

// RenewUnsure does nothing.
func (*Tables) RenewUnsure([]Direction) {}

// AddUnsure does nothing.
func (*Tables) AddUnsure([]Direction) error { return nil }

// Remove returns an *UnsupportedError.
func (*Tables) Remove() error { return errNoBuild }

// Close does nothing.
func (*Tables) Close() error { return nil }

// Forwards returns an *UnsupportedError.
func Forwards(int, []Link) ([]Forward, error) { return nil, errNoBuild }

// Children returns an *UnsupportedError.
func Children(int, []Link, []netip.Prefix) ([]ChildVerdicts, error) { return nil, errNoBuild }

// A Map is never made on this system.
type Map struct{}

// PeerGroups returns an *UnsupportedError.
func (*Tables) PeerGroups() ([]netip.Prefix, error) { return nil, errNoBuild }

// Carries returns false.
func (*Map) Carries(*cone.Permission) bool { return false }

// Max returns 0.
func (*Map) Max() int { return 0 }

// SetLifetime does nothing.
func (*Map) SetLifetime(time.Duration) {}

// Configure does nothing.
func (*Map) Configure(*MapConfig) {}

// Broken returns false.
func (*Map) Broken() bool { return false }

// Grant refuses all.
func (*Map) Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error)) {
	for i := range ps {
		refused(i, cone.ReasonNoBackend, errNoBuild)
	}
}

// Revoke returns an *UnsupportedError, as do Deny and List.
func (*Map) Revoke([]cone.Permission) error { return errNoBuild }

// Deny returns an *UnsupportedError.
func (*Map) Deny([]cone.Permission, cone.Reason) error { return errNoBuild }

// Revoked returns an *UnsupportedError.
func (*Map) Revoked() ([]cone.Key, error) { return nil, errNoBuild }

// HasRevoked returns false.
func (*Map) HasRevoked() bool { return false }

// List returns an *UnsupportedError.
func (*Map) List(func(cone.Permission, time.Duration)) error { return errNoBuild }

// Missing fails.
func (*Map) Missing([]cone.Permission, func(int)) error { return errNoBuild }

// Refresh calls lost for all.
func (*Map) Refresh(ps []cone.Permission, lost func(i int)) {
	for i := range ps {
		lost(i)
	}
}

// PortChoosers says that this build reads no rules.
func PortChoosers(int) ([]string, error) { return nil, errNoBuild }

// Uplinks says that no rule names a link.
func Uplinks(int, []LAN) ([]string, error) { return nil, nil }

// FixedSources says that nothing is known.
func FixedSources(int) (addrs []AddrRange, unknown bool, err error) { return nil, true, errNoBuild }

// Has returns false.
func (r AddrRange) Has(netip.Addr) bool { return false }

// Mappings are never made on this system.
type Mappings struct{}

// SetLifetime does nothing.
func (*Mappings) SetLifetime(time.Duration) {}

// Keep refuses all.
func (*Mappings) Keep(ms []Mapping, refused func(i int, err error)) {
	for i := range ms {
		refused(i, errNoBuild)
	}
}

// Add refuses all.
func (m *Mappings) Add(ms []Mapping, refused func(i int, err error)) { m.Keep(ms, refused) }

// Release returns an *UnsupportedError.
func (*Mappings) Release([]Mapping) error { return errNoBuild }

// Revoke returns an *UnsupportedError, as do Take, List and Forget.
func (*Mappings) Revoke([]Mapping) error { return errNoBuild }

// Teach returns an *UnsupportedError.
func (*Mappings) Teach([]Mapping) error { return errNoBuild }

// Take returns an *UnsupportedError.
func (*Mappings) Take([]Taken) error { return errNoBuild }

// List returns an *UnsupportedError.
func (*Mappings) List(func(Mapping, time.Duration)) error { return errNoBuild }

// Forget returns an *UnsupportedError.
func (*Mappings) Forget(netip.Addr) error { return errNoBuild }

// Addresses returns an *UnsupportedError, as do NoteAddresses and DropAddresses.
func (*Mappings) Addresses() ([]netip.Addr, error) { return nil, errNoBuild }

// NoteAddresses returns an *UnsupportedError.
func (*Mappings) NoteAddresses([]netip.Addr) error { return errNoBuild }

// DropAddresses returns an *UnsupportedError.
func (*Mappings) DropAddresses([]netip.Addr) error { return errNoBuild }

// Return returns an *UnsupportedError.
func (*Mappings) Return(netip.Addr) error { return errNoBuild }

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
