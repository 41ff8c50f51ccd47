package daemon

import (
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Backend makes permissions stand in the kernel. All methods but List are
// called by the loop alone.
type Backend interface {
	// Grant makes ps stand, in order, and calls refused for each that does
	// not: its index, why, and the kernel's error if there was one.
	Grant(ps []cone.Permission, refused func(i int, r cone.Reason, err error))
	// Revoke ends ps. What is gone already is no error.
	Revoke(ps []cone.Permission) error
	// Refresh renews the kernel's timeouts of ps and calls lost for each that
	// does not stand any more.
	Refresh(ps []cone.Permission, lost func(i int))
	// List calls f for each permission that stands. It may run beside all
	// other methods.
	List(f func(cone.Permission)) error
	// SetLifetime sets the timeout of what is granted or refreshed from now on.
	SetLifetime(time.Duration)
	// Standing and Max are how many permissions stand and may stand.
	Standing() int
	Max() int
	// Close lets go of the kernel and revokes nothing.
	Close() error
}
