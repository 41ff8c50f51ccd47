package debian

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Tree is a folder with unpacked packages, and how to get it. Processes that share
// the cache take turns.
type Tree struct {
	// Name is a folder below the cache, such as "kernels/6.1".
	Name string
	// Suites are the parts of the archive to look in; apt takes the newest version of
	// each package.
	Suites []string
	// Arch is Debian's name of the packages' architecture. Empty means amd64.
	Arch string
	// Packages names the packages to download.
	Packages func(context.Context, *Apt) ([]string, error)
	// Unpack unpacks the packages in the folder debs into the folder tree.
	Unpack func(ctx context.Context, debs, tree string) error
	// Key identifies what Unpack does: a tree with another key is not used.
	Key string
	// Fresh is how long a tree is used without asking the archive for newer packages.
	Fresh time.Duration
}

const fetchTime = 5 * time.Minute

// stamp is a file in each tree: it lists the packages, and its time is that of the
// last look at the archive.
const stamp = "packages"

// Fetch returns the folder. It uses the cache if that is fresh, or as new as the
// archive; old says why the archive could not be asked. Without a cache, an
// unreachable archive is an ArchiveError.
func (t Tree) Fetch(ctx context.Context) (dir string, old, err error) {
	cache, err := os.UserCacheDir()
	if err != nil {
		return "", nil, err
	}
	cache = filepath.Join(cache, "conenatd", t.Name)
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", nil, err
	}
	unlock, err := lock(filepath.Join(cache, "lock"))
	if err != nil {
		return "", nil, err
	}
	defer func() { _ = unlock() }()

	dir, age := t.newest(cache)
	if dir != "" && age < t.Fresh {
		return dir, nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTime)
	defer cancel()
	renewed, err := t.renew(ctx, cache)
	if err != nil && dir != "" {
		return dir, err, nil
	}
	return renewed, nil, err
}

func lock(path string) (unlock func() error, err error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	return f.Close, nil
}

// prefix is the start of all folder names with this key.
func (t Tree) prefix() string { return fmt.Sprintf("tree-%.3x-", sha256.Sum256([]byte(t.Key))) }

// newest finds the tree in the cache that was renewed last.
func (t Tree) newest(cache string) (dir string, age time.Duration) {
	stamps, _ := filepath.Glob(filepath.Join(cache, t.prefix()+"*", stamp))
	for _, s := range stamps {
		if st, err := os.Stat(s); err == nil && (dir == "" || time.Since(st.ModTime()) < age) {
			dir, age = filepath.Dir(s), time.Since(st.ModTime())
		}
	}
	return dir, age
}

// renew asks the archive for its newest packages and unpacks them unless that
// was done before.
func (t Tree) renew(ctx context.Context, cache string) (string, error) {
	a, err := newApt(cache, t.Suites, cmp.Or(t.Arch, "amd64"))
	if err != nil {
		return "", err
	}
	if _, err := a.Run(ctx, "apt-get", "update"); err != nil {
		return "", err
	}
	names, err := t.Packages(ctx, a)
	if err != nil {
		return "", err
	}
	// Each line has an address, a file name, a size and a checksum.
	list, err := a.Run(ctx, "apt-get", append([]string{"download", "--print-uris"}, names...)...)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, fmt.Sprintf("%s%.6x", t.prefix(), sha256.Sum256([]byte(list))))
	if _, err := os.Stat(filepath.Join(dir, stamp)); err == nil {
		now := time.Now()
		return dir, os.Chtimes(filepath.Join(dir, stamp), now, now)
	}
	debs, err := os.MkdirTemp(cache, "debs-")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(debs)
	a.dir = debs
	if _, err := a.Run(ctx, "apt-get", append([]string{"download"}, names...)...); err != nil {
		return "", err
	}
	fresh := filepath.Join(debs, "tree")
	if err := os.Mkdir(fresh, 0o755); err != nil {
		return "", err
	}
	if err := t.Unpack(ctx, debs, fresh); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(fresh, stamp), []byte(list), 0o644); err != nil {
		return "", err
	}
	// A run that still uses an older tree has ended by now.
	if old, age := t.newest(cache); old != "" && age > t.Fresh {
		os.RemoveAll(old)
	}
	return dir, os.Rename(fresh, dir)
}
