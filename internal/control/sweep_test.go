package control

import (
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// machine is a /proc with two processes: the second one's thread 21 is in another network
// namespace, it holds one open, and has one mounted.
var machine = map[string]string{
	"self/ns/pid":        firstPIDs,
	"1/ns/net":           "net:[100]",
	"1/task/1/ns/net":    "net:[100]",
	"1/task/1/ns/mnt":    "mnt:[1]",
	"2/task/2/ns/net":    "net:[100]",
	"2/task/2/ns/mnt":    "mnt:[1]",
	"2/task/21/ns/net":   "net:[101]",
	"2/task/21/ns/mnt":   "mnt:[2]",
	"2/fd/0":             "/dev/null",
	"2/fd/3":             "net:[102]",
	"1/task/1/mountinfo": "22 1 0:21 / / rw - ext4 /dev/vda rw\n",
	"2/task/2/mountinfo": "not read: the first process has the same mounts\n30 22 0:4 net:[105] / rw - nsfs nsfs rw\n",
	"2/task/21/mountinfo": "22 1 0:21 / / rw - ext4 /dev/vda rw\n" +
		"30 22 0:4 net:[103] /run/netns/x rw shared:5 - nsfs nsfs rw\n",
}

// Notes of living namespaces stay, whatever keeps these alive, and so do new ones. Where
// some processes cannot be seen, all stay.
//
// Fails when the sweep takes a note whose namespace may be there, or leaves one that is gone.
func TestNotesOfNamespacesThatAreGoneAreRemoved(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(proc map[string]string)
		all    bool // stay
	}{
		"all processes are seen":      {func(map[string]string) {}, false},
		"in another PID namespace":    {func(proc map[string]string) { proc["self/ns/pid"] = "pid:[4026532000]" }, true},
		"with hidepid":                {func(proc map[string]string) { delete(proc, "1/ns/net") }, true},
		"a process cannot be read":    {func(proc map[string]string) { proc["2/task/21/ns/net"] = "" }, true},
		"its files cannot be read":    {func(proc map[string]string) { proc["2/fd/3"] = "" }, true},
		"its mounts cannot be told":   {func(proc map[string]string) { proc["2/task/21/ns/mnt"] = "" }, true},
		"a thread ended meanwhile":    {func(proc map[string]string) { delete(proc, "2/task/21/mountinfo"); proc["2/fd/9"] = "net:[103]" }, false},
		"its mounts cannot be parsed": {func(proc map[string]string) { proc["2/task/21/mountinfo"] = strings.Repeat("x", 1<<17) }, true},
	} {
		t.Run(name, func(t *testing.T) {
			files := maps.Clone(machine)
			tt.change(files)
			proc, dir := t.TempDir(), t.TempDir()
			for path, to := range files {
				put(t, filepath.Join(proc, path), to)
			}
			var want []string
			note := func(name string, age time.Duration, stays bool) {
				path := filepath.Join(dir, name)
				if err := os.WriteFile(path, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				at := time.Now().Add(-age)
				if err := os.Chtimes(path, at, at); err != nil {
					t.Fatal(err)
				}
				if stays || tt.all {
					want = append(want, name)
				}
			}
			for _, inode := range []string{"100", "101", "102", "103"} {
				note(inode+".nf_conntrack_acct", time.Hour, true)
			}
			note("104.nf_conntrack_acct", time.Hour, false)
			note("104.nf_conntrack_expect_max", 0, true)
			note("104.revoked", time.Hour, false)
			note("104.sock", time.Hour, true) // sweep judges it by another rule
			note("readme.txt", time.Hour, true)
			sweepNotes(dir, proc, staleTime)
			var left []string
			entries, err := os.ReadDir(dir)
			for _, e := range entries {
				left = append(left, e.Name())
			}
			if !slices.Equal(left, want) || err != nil {
				t.Errorf("left %q, want %q: %v", left, want, err)
			}
		})
	}
}

// put makes a symbolic link, or for a mountinfo a file. A link to nothing cannot be read.
func put(t *testing.T, path, to string) {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	switch {
	case err != nil:
	case filepath.Base(path) == "mountinfo", to == "":
		err = os.WriteFile(path, []byte(to), 0o600) // readlink(2) of a file fails with EINVAL
	default:
		err = os.Symlink(to, path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// The kernel shows namespaces as the sweep reads them.
func TestOwnNamespaceIsFound(t *testing.T) {
	live, err := namespaces("/proc")
	if err != nil {
		t.Skip("this process does not see all others:", err)
	}
	if own, err := os.Readlink("/proc/self/ns/net"); err != nil || !live[own] {
		t.Errorf("%s is not one of %v: %v", own, live, err)
	}
}
