package debian

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

const arch = "x86_64-linux-gnu"

// UnpackAll is an Unpack of a Tree that unpacks all packages, without their documents.
func UnpackAll(ctx context.Context, debs, tree string) error {
	if err := UnpackWhole(ctx, debs, tree); err != nil {
		return err
	}
	return os.RemoveAll(filepath.Join(tree, "usr/share"))
}

// UnpackWhole is an Unpack of a Tree for programs that need their files in usr/share.
func UnpackWhole(ctx context.Context, debs, tree string) error {
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", f, tree).CombinedOutput(); err != nil {
			return fmt.Errorf("unpack %s: %w: %s", filepath.Base(f), err, out)
		}
	}
	return nil
}

// Libs returns the library folders of a tree. Newer releases have only the second.
func Libs(tree string) []string {
	return []string{filepath.Join(tree, "lib", arch), filepath.Join(tree, "usr/lib", arch)}
}

// Loader returns the dynamic loader in a tree, which belongs to its C library.
func Loader(tree string) string {
	for _, dir := range Libs(tree) {
		path := filepath.Join(dir, "ld-linux-x86-64.so.2")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return tree + ": no loader"
}

// Program returns what runs a program of a tree, such as usr/sbin/nft, with the libraries of
// the tree.
func Program(tree, name string, args ...string) (path string, all []string) {
	return Loader(tree), append([]string{"--library-path", strings.Join(Libs(tree), ":"), filepath.Join(tree, name)}, args...)
}
