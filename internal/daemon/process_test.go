package daemon

import (
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

func TestReadProcessSeesWhatIsTaken(t *testing.T) {
	const more, memory = 10, 64 << 20
	before := readProcess()
	end := make(chan struct{})
	defer close(end)
	for range more {
		f, err := os.Open(os.DevNull)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		go func() { <-end }()
	}
	held, err := unix.Mmap(-1, 0, memory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANONYMOUS|unix.MAP_PRIVATE|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(held)
	runtime.GC() // not between the two readings
	after := readProcess()
	if after.Goroutines < more {
		t.Errorf("%d goroutines, want %d or more", after.Goroutines, more)
	}
	if n := after.Files - before.Files; n != more {
		t.Errorf("%d open files more, want %d", n, more)
	}
	if after.Resident < before.Resident+memory*9/10 {
		t.Errorf("%d bytes are resident, %d were before there were %d more", after.Resident, before.Resident, memory)
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	const near = 1 << 20
	if after.Heap+near < m.HeapAlloc || after.Heap > m.HeapAlloc+near {
		t.Errorf("%d bytes of objects, %d says the runtime", after.Heap, m.HeapAlloc)
	}
}
