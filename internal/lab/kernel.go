package lab

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// KernelBefore reports whether this kernel is older than a version, and returns its release. A
// distribution may have put mends of later versions into an older kernel.
func KernelBefore(major, minor int) (before bool, release string, err error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return false, "", err
	}
	release = unix.ByteSliceToString(u.Release[:])
	var a, b int
	if _, err := fmt.Sscanf(release, "%d.%d", &a, &b); err != nil {
		return false, release, fmt.Errorf("kernel release %q: %w", release, err)
	}
	return a < major || a == major && b < minor, release, nil
}
