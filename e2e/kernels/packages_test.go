package kernels

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
)

// suites are the parts of Debian's archive for each kernel for amd64; with security
// updates the newest kernel is taken.
var suites = map[string][]string{
	"5.10": {"bullseye", "bullseye-security"},
	"6.1":  {"bookworm", "bookworm-security"},
	"6.12": {"trixie", "trixie-security"},
	"7.3":  {"trixie-backports"},
}

// known lists the kernels, for messages.
func known() string {
	return strings.Join(append(slices.Sorted(maps.Keys(suites)), slices.Sorted(maps.Keys(machines))...), " ")
}

// kernelOf is the source of Debian's kernel of that version for amd64.
func kernelOf(version string) debian.Tree {
	return debian.Tree{
		Name:   "kernels/" + version,
		Suites: suites[version],
		Packages: func(ctx context.Context, a *debian.Apt) ([]string, error) {
			return packagesOf(ctx, a, "linux-image-amd64")
		},
		Unpack: func(ctx context.Context, debs, dir string) error {
			k := tree(dir)
			if err := k.unpack(ctx, debs, wanted); err != nil {
				return err
			}
			return unpackImage(ctx, k.path("vmlinuz"), k.path("vmlinux"))
		},
		Key:   wanted.String(),
		Fresh: 24 * time.Hour,
	}
}

// fetch returns the folder with what the source has.
func fetch(t *testing.T, source debian.Tree) tree {
	t.Helper()
	dir, old, err := source.Fetch(t.Context())
	if _, ok := errors.AsType[debian.ArchiveError](err); ok {
		debian.Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	if old != nil {
		t.Logf("using the cached packages: %v", old)
	}
	return tree(dir)
}

var (
	dependsLine = regexp.MustCompile(`(?m)^ *Depends: (linux-(?:image|binary|modules)-[0-9]\S*)$`)
	// From 7.1 on the image package is empty and depends on two others.
	imagePackage = regexp.MustCompile(`^linux-image-`)
)

// packagesOf finds the packages of the kernel that the meta package depends on.
func packagesOf(ctx context.Context, a *debian.Apt, meta string) ([]string, error) {
	out, err := a.Run(ctx, "apt-cache", "depends", meta)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, m := range dependsLine.FindAllStringSubmatch(out, -1) {
		names = append(names, m[1])
		if imagePackage.MatchString(m[1]) {
			more, err := packagesOf(ctx, a, m[1])
			if err != nil {
				return nil, err
			}
			names = append(names, more...)
		}
	}
	if len(names) == 0 && !imagePackage.MatchString(meta) {
		return nil, fmt.Errorf("package %s depends on no kernel", meta)
	}
	return names, nil
}
