package daemon

import (
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// descriptors is how many open files a daemon has at most while nobody asks it anything,
// with a reserve for connections and for what it reads in between.
const descriptors = 40

// enoughDescriptors returns an error if this process may not open as many files as a daemon
// needs. Without them each look at the kernel fails in another way, some of the time.
func enoughDescriptors() error {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return fmt.Errorf("read the limit of open files: %w", err)
	}
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("count open files: %w", err)
	}
	open := uint64(len(entries) - 1) // without that of ReadDir
	if most := min(limit.Cur, math.MaxInt64); most < open+descriptors {
		return fmt.Errorf("%d open files are needed beside the %d that are open, but the limit is %d: raise it (LimitNOFILE= of systemd, ulimit -n)",
			descriptors, open, most)
	}
	return nil
}
