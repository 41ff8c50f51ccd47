package userrules

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Tables that are looked for by name.
const (
	natTable    = "nat"
	filterTable = "filter"
)

// A rawLegacy is a table of iptables-legacy as the kernel returned it.
type rawLegacy struct {
	family        *legacyFamily
	name          string
	info, entries []byte
	err           error  // why it could not be read
	sum           uint64 // hash of the table
}

// readLegacy reads the tables of iptables-legacy with the given names, as far as they
// exist, in the network namespace behind the descriptor netns, 0 for the current one. It
// asks the kernel only for tables that are listed, because asking for a missing table
// creates it. hidden are the tables that may exist: only root and its group may read the list.
func readLegacy(netns int, f *legacyFamily, names ...string) (tables []rawLegacy, hidden []string, err error) {
	err = inNamespace(netns, func() error {
		var there []string
		there, hidden, err = f.listed(names)
		if err != nil || len(there) == 0 {
			return err
		}
		fd, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer func() { _ = unix.Close(fd) }()
		for _, name := range there {
			t := rawLegacy{family: f, name: name}
			if err := t.read(fd); err != nil {
				t.err = fmt.Errorf("read table %s of %s: %w", name, f.program, nfnl.Permitted(err))
			}
			tables = append(tables, t)
		}
		return nil
	})
	return tables, hidden, err
}

// listed returns those of the tables that exist in the current network namespace, and those
// that may exist.
func (f *legacyFamily) listed(tables []string) (there, hidden []string, err error) {
	b, err := os.ReadFile(f.names)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil
	case err == nil:
		return filter(tables, func(t string) bool { return hasLine(b, t) }), nil, nil
	case !errors.Is(err, fs.ErrPermission):
		return nil, nil, fmt.Errorf("list the tables of %s: %w", f.program, err)
	}
	// A table exists only if its module is loaded or built into the kernel.
	modules, err := os.ReadFile("/proc/modules")
	return nil, filter(tables, func(t string) bool { return err != nil || mayBeLoaded(modules, f.core, f.module+t) }), nil
}

func filter(all []string, f func(string) bool) []string {
	return slices.DeleteFunc(slices.Clone(all), func(s string) bool { return !f(s) })
}

func mayBeLoaded(modules []byte, core, table string) bool {
	return hasLine(modules, table) || !hasLine(modules, core)
}

// hasLine reports whether the first word of a line is word.
func hasLine(b []byte, word string) bool {
	return slices.ContainsFunc(bytes.Split(b, []byte("\n")), func(line []byte) bool {
		f := bytes.Fields(line)
		return len(f) > 0 && string(f[0]) == word
	})
}

// maxReads is how often a table that keeps changing is read.
const maxReads = 5

const (
	// These have the same numbers for IPv6.
	soGetInfo    = 64 // IPT_SO_GET_INFO
	soGetEntries = 65 // IPT_SO_GET_ENTRIES
)

// legacyHeader is the size of struct ipt_get_entries without entries.
var legacyHeader = aligned(legacyNameLen + 4)

// read reads the table over a socket. The kernel returns description and entries
// separately, and refuses to return entries if their size differs from the one given.
func (t *rawLegacy) read(fd int) error {
	for range maxReads {
		before, err := t.describe(fd)
		if err != nil {
			return err
		}
		size := binary.NativeEndian.Uint32(before[legacySize:])
		b := make([]byte, legacyHeader+int(size))
		copy(b, t.name)
		binary.NativeEndian.PutUint32(b[legacyNameLen:], size)
		if b, err = getsockopt(fd, t.family.level, soGetEntries, b); errors.Is(err, unix.EAGAIN) {
			continue
		}
		if err != nil {
			return err
		}
		after, err := t.describe(fd)
		if err != nil {
			return err
		}
		if len(b) == legacyHeader+int(size) && bytes.Equal(before, after) {
			t.info, t.entries = after, b[legacyHeader:]
			return nil
		}
	}
	return nfnl.ErrInterrupted
}

func (t *rawLegacy) describe(fd int) ([]byte, error) {
	b := make([]byte, legacyInfoLen)
	copy(b, t.name)
	b, err := getsockopt(fd, t.family.level, soGetInfo, b)
	if err == nil && len(b) < legacyInfoLen {
		err = nfnl.ErrMalformed
	}
	return b, err
}

// getsockopt sends the request in b, and returns the part of b that holds the answer.
func getsockopt(fd, level, name int, b []byte) ([]byte, error) {
	n := uint32(len(b))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(&b[0])), uintptr(unsafe.Pointer(&n)), 0)
	if errno != 0 {
		return nil, os.NewSyscallError("getsockopt", errno)
	}
	return b[:min(int(n), len(b))], nil
}

// decode decodes the table. If it could not be read, or is not understood, the result says
// so in failed.
func (t rawLegacy) decode() *table {
	d, err := (*table)(nil), t.err
	if err == nil {
		if d, err = decodeLegacy(t.family, t.info, t.entries); err != nil {
			err = fmt.Errorf("read table %s of %s: %w", t.name, t.family.program, err)
		}
	}
	if err != nil {
		d = t.family.table(t.name)
		d.failed, d.refused = err, t.err != nil
	}
	if t.err == nil {
		d.print = t.sum
	}
	return d
}

// inNamespace runs fn in the network namespace behind the descriptor netns, 0 for the
// current one.
func inNamespace(netns int, fn func() error) error {
	if netns == 0 {
		return fn()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := unix.Setns(netns, unix.CLONE_NEWNET)
		if err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
