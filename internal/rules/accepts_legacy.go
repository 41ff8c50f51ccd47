//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"
)

// The files that list the tables of iptables-legacy, the modules that make such
// files, and those that make the tables named filter.
const (
	legacyTables4, legacyCore4, legacyFilter4 = "/proc/thread-self/net/ip_tables_names", "ip_tables", "iptable_filter"
	legacyTables6, legacyCore6, legacyFilter6 = "/proc/thread-self/net/ip6_tables_names", "ip6_tables", "ip6table_filter"
)

// legacyFilters reports whether iptables-legacy may filter forwarded packets of IPv4
// and of IPv6. To ask the kernel for a table makes it.
func legacyFilters(netns int) (v4, v6 bool, err error) {
	err = inNamespace(netns, func() error {
		var errs [2]error
		v4, errs[0] = legacyFilter(legacyTables4, legacyCore4, legacyFilter4)
		v6, errs[1] = legacyFilter(legacyTables6, legacyCore6, legacyFilter6)
		return errors.Join(errs[:]...)
	})
	return v4, v6, err
}

func legacyFilter(tables, core, filter string) (bool, error) {
	b, err := os.ReadFile(tables)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err == nil:
		return hasLine(b, "filter"), nil
	case !errors.Is(err, fs.ErrPermission):
		return false, err
	}
	// The file is root's. There is no such table unless its module is loaded or
	// a part of the kernel.
	modules, err := os.ReadFile("/proc/modules")
	return err != nil || mayBeLoaded(modules, core, filter), nil
}

func mayBeLoaded(modules []byte, core, filter string) bool {
	return hasLine(modules, filter) || !hasLine(modules, core)
}

// hasLine reports whether a line begins with a word.
func hasLine(b []byte, word string) bool {
	return slices.ContainsFunc(bytes.Split(b, []byte("\n")), func(line []byte) bool {
		f := bytes.Fields(line)
		return len(f) > 0 && string(f[0]) == word
	})
}

// inNamespace runs fn in the network namespace behind the descriptor netns, 0 for
// the current.
func inNamespace(netns int, fn func() error) error {
	if netns == 0 {
		return fn()
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		err := unix.Setns(netns, unix.CLONE_NEWNET)
		if err != nil {
			done <- fmt.Errorf("enter network namespace: %w", err)
			return
		}
		done <- fn()
	}()
	return <-done
}
