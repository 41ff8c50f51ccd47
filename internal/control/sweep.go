package control

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// staleTime is the age at which a file of another network namespace may be one of a dead
// daemon: nobody answers on a socket between bind(2) and listen(2) either.
const staleTime = time.Minute

// Sweep removes the default sockets of dead daemons, and what daemons noted for network
// namespaces that are gone. The caller must hold the lock of its network namespace.
func Sweep() error {
	path, err := DefaultSocket()
	if err != nil {
		return err
	}
	if stale(path) {
		err = os.Remove(path)
	}
	sweep(folder, staleTime)
	SweepNotes()
	return err
}

// sweep removes the sockets in dir that are at least as old as age and on which nobody
// answers. Sockets that cannot be removed, such as another user's, stay.
func sweep(dir string, age time.Duration) {
	for _, path := range olderThan(age, dir, "*.sock") {
		if stale(path) {
			_ = os.Remove(path)
		}
	}
}

// SweepNotes removes from the default folder the notes (File) of network namespaces that are
// gone. A note whose namespace may still be there stays: a later daemon needs it. So nothing
// is removed unless this process sees all others of the machine, as root does with all
// capabilities, outside of containers.
func SweepNotes() { sweepNotes(folder, "/proc", staleTime) }

func sweepNotes(dir, proc string, age time.Duration) {
	notes := olderThan(age, dir, "[0-9]*.*")
	if len(notes) == 0 {
		return
	}
	live, err := namespaces(proc)
	if err != nil {
		return
	}
	for _, path := range notes {
		inode, suffix, _ := strings.Cut(filepath.Base(path), ".")
		if suffix != "sock" && !live["net:["+inode+"]"] {
			_ = os.Remove(path)
		}
	}
}

// olderThan returns the files in dir that match pattern and are at least as old as age.
func olderThan(age time.Duration, dir, pattern string) (paths []string) {
	all, _ := filepath.Glob(filepath.Join(dir, pattern)) // the error is for a bad pattern only
	for _, path := range all {
		if info, err := os.Lstat(path); err == nil && time.Since(info.ModTime()) >= age {
			paths = append(paths, path)
		}
	}
	return paths
}

// firstPIDs is the first PID namespace (PROC_PID_INIT_INO in the kernel).
const firstPIDs = "pid:[4026531836]"

// namespaces returns the network namespaces of the machine, as "net:[INODE]": those that a
// thread is in, or that a process holds open or has mounted. It fails unless this process
// may look at all processes.
func namespaces(proc string) (map[string]bool, error) {
	if to, err := os.Readlink(proc + "/self/ns/pid"); err != nil || to != firstPIDs {
		return nil, errors.Join(err, errors.New("there may be processes outside of this PID namespace"))
	}
	if _, err := os.Readlink(proc + "/1/ns/net"); err != nil { // hidepid leaves out other users' processes
		return nil, err
	}
	live := map[string]bool{}
	for _, pattern := range []string{"/[0-9]*/task/[0-9]*/ns/net", "/[0-9]*/fd/*"} {
		links, _ := filepath.Glob(proc + pattern)
		for _, link := range links {
			to, err := os.Readlink(link)
			if err != nil && !gone(err) {
				return nil, err
			}
			live[to] = true
		}
	}
	mounts, _ := filepath.Glob(proc + "/[0-9]*/task/[0-9]*/ns/mnt")
	read := map[string]bool{}
	for _, link := range mounts {
		to, err := os.Readlink(link)
		if err != nil && !gone(err) {
			return nil, err
		}
		if err != nil || read[to] {
			continue
		}
		if err := mounted(strings.TrimSuffix(link, "/ns/mnt")+"/mountinfo", live); err != nil {
			return nil, err
		}
		read[to] = true
	}
	return live, nil
}

// mounted adds what is mounted of namespaces: the root of such a mount is "net:[INODE]", see
// proc_pid_mountinfo(5).
func mounted(path string, live map[string]bool) error {
	f, err := os.Open(path)
	if gone(err) || errors.Is(err, unix.EINVAL) { // of a process that ended
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 3 {
			live[fields[3]] = true
		}
	}
	if err := lines.Err(); !gone(err) {
		return err
	}
	return nil
}

// gone reports whether err says that a process has ended.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }
