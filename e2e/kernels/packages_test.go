package kernels

import (
	"context"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
)

// suites are the parts of Debian's archive for each kernel; with security updates
// the newest kernel is taken.
var suites = map[string][]string{
	"5.10": {"bullseye", "bullseye-security"},
	"6.1":  {"bookworm", "bookworm-security"},
	"6.12": {"trixie", "trixie-security"},
	"7.3":  {"trixie-backports"},
}

// known lists the kernels, for messages.
func known() string { return strings.Join(slices.Sorted(maps.Keys(suites)), " ") }

// fetch returns the folder with Debian's kernel of that version.
func fetch(t *testing.T, version string) (tree, error) {
	dir, old, err := debian.Tree{
		Name:   "kernels/" + version,
		Suites: suites[version],
		Packages: func(ctx context.Context, a *debian.Apt) ([]string, error) {
			return packagesOf(ctx, a, "linux-image-amd64")
		},
		Unpack: func(ctx context.Context, debs, dir string) error { return tree(dir).unpack(ctx, debs) },
		Key:    wanted.String(),
		Fresh:  24 * time.Hour,
	}.Fetch(t.Context())
	if old != nil {
		t.Logf("using the cached kernel: %v", old)
	}
	return tree(dir), err
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
