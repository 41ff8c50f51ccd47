package daemon

import (
	"os"
	"runtime"
	"runtime/metrics"
	"strconv"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// readProcess says which resources this process uses. What it cannot find out is
// zero.
func readProcess() control.Process {
	p := control.Process{Goroutines: runtime.NumGoroutine(), Resident: resident(), Heap: heap()}
	if entries, err := os.ReadDir("/proc/self/fd"); err == nil {
		p.Files = len(entries) - 1 // without that of ReadDir
	}
	return p
}

// resident returns the resident set size in bytes, see proc_pid_statm(5).
func resident() uint64 {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	fields := strings.Fields(string(b))
	if len(fields) < 2 {
		return 0
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil {
		return 0
	}
	return pages * uint64(os.Getpagesize())
}

// heap returns the bytes of all objects on the heap, including dead ones that the garbage
// collector has not freed yet. Unlike runtime.ReadMemStats it does not stop the world.
func heap() uint64 {
	sample := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
	metrics.Read(sample)
	if sample[0].Value.Kind() != metrics.KindUint64 {
		return 0
	}
	return sample[0].Value.Uint64()
}
