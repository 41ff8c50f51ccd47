package lab

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// WithoutCapabilities runs fn without effective capabilities on this goroutine's thread. The
// goroutine must then end: the thread stays locked to it, and ends with it.
func WithoutCapabilities(fn func() error) error {
	runtime.LockOSThread()
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&header, &none[0]); err != nil {
		return err
	}
	return fn()
}
