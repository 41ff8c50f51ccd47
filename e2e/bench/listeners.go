package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/ctwatch"
)

// A foreign is a socket that receives conntrack events and belongs to somebody else.
type foreign struct {
	ctwatch.Listener
	netns uint64 // inode of its network namespace
	pid   int    // a process that holds it, or 0
	name  string
}

func (f foreign) String() string {
	if f.pid == 0 {
		return fmt.Sprintf("netlink port %d in network namespace %d", f.Port, f.netns)
	}
	return fmt.Sprintf("process %d (%s) in network namespace %d", f.pid, f.name, f.netns)
}

// errDisturbed says that measurements would not be sound.
var errDisturbed = errors.New("somebody listens to conntrack events")

// undisturbed returns an errDisturbed that names the listeners to conntrack which this program
// did not start.
func undisturbed() error {
	all, err := foreigners()
	if err != nil || len(all) == 0 {
		return err
	}
	names := make([]string, len(all))
	for i, f := range all {
		names[i] = f.String()
	}
	return fmt.Errorf("%w, so the kernel builds events for new flows in all network namespaces: %s. "+
		"End it, or measure all the same with -disturbed", errDisturbed, strings.Join(names, ", "))
}

// foreigners looks for listeners in all network namespaces that a thread or an open file of a
// process, or a mount leads to. It does not see a namespace that nothing but a socket keeps
// alive.
func foreigners() (all []foreign, err error) {
	owners, spaces, err := look()
	if err != nil {
		return nil, err
	}
	for inode, path := range spaces {
		there, err := listenersIn(path)
		if slices.ContainsFunc(gone, func(e error) bool { return errors.Is(err, e) }) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("look for listeners to conntrack in %s: %w", path, err)
		}
		for _, l := range there {
			f := foreign{Listener: l, netns: inode, pid: owners[l.Inode]}
			if ours(f.pid) {
				continue
			}
			if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", f.pid)); err == nil {
				f.name = strings.TrimSpace(string(name))
			}
			all = append(all, f)
		}
	}
	slices.SortFunc(all, func(a, b foreign) int { return int(a.Port) - int(b.Port) })
	return all, nil
}

// gone are the errors for a process that has ended since, or for a file that it has closed and
// whose number now is that of another file, such as a socket.
var gone = []error{unix.ENOENT, unix.ESRCH, unix.ENXIO, unix.EINVAL}

// look returns which process has a socket, by the socket's inode, and a path for each network
// namespace, by its inode.
func look() (owners map[uint64]int, spaces map[uint64]string, err error) {
	owners, spaces = make(map[uint64]int), make(map[uint64]string)
	links, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*/ns/net")
	if err != nil {
		return nil, nil, err
	}
	files, err := filepath.Glob("/proc/[0-9]*/fd/[0-9]*")
	if err != nil {
		return nil, nil, err
	}
	for _, path := range slices.Concat(links, files) {
		to, err := os.Readlink(path)
		if err != nil {
			continue // closed since
		}
		if inode, ok := inodeOf(to, "net"); ok && spaces[inode] == "" {
			spaces[inode] = path
		}
		if inode, ok := inodeOf(to, "socket"); ok {
			pid, err := strconv.Atoi(strings.Split(path, "/")[2])
			if err != nil {
				return nil, nil, err
			}
			if !ours(owners[inode]) {
				owners[inode] = pid
			}
		}
	}
	mounts, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = mounts.Close() }()
	lines := bufio.NewScanner(mounts)
	for lines.Scan() {
		const root, at = 3, 4 // see proc_pid_mountinfo(5)
		if f := strings.Fields(lines.Text()); len(f) > at {
			if inode, ok := inodeOf(f[root], "net"); ok && spaces[inode] == "" {
				spaces[inode] = f[at]
			}
		}
	}
	return owners, spaces, lines.Err()
}

// inodeOf returns the number in the name of a special file, such as "net:[4026531840]".
func inodeOf(name, kind string) (uint64, bool) {
	digits, ok := strings.CutPrefix(name, kind+":[")
	if !ok {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSuffix(digits, "]"), 10, 64)
	return n, err == nil
}

// listenersIn returns the listeners in the network namespace that path leads to.
func listenersIn(path string) (all []ctwatch.Listener, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock it: the thread ends with the goroutine
		var ns, list *os.File
		// A pipe that has the number by now must not block.
		if ns, err = os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
			return
		}
		defer func() { _ = ns.Close() }()
		if err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return
		}
		if list, err = os.Open("/proc/thread-self/net/netlink"); err != nil {
			return
		}
		defer func() { _ = list.Close() }()
		all, err = ctwatch.Listeners(list)
	}()
	<-done
	return all, err
}

// ours reports whether a process is this program or one that it started.
func ours(pid int) bool {
	for pid > 1 {
		if pid == os.Getpid() {
			return true
		}
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return false
		}
		parent, _ := field(string(status), "PPid")
		if pid, err = strconv.Atoi(parent); err != nil {
			return false
		}
	}
	return false
}

// field returns the value of the first line "name: value".
func field(text, name string) (string, bool) {
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value), true
		}
	}
	return "", false
}
