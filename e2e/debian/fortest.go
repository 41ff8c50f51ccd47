package debian

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// ForTest returns a tree with packages of Debian 12 and all that they need, unpacked and not
// installed. name is that of the tree in the cache. Without them the test ends as by Missing.
func ForTest(t *testing.T, name string, unpack func(ctx context.Context, debs, tree string) error, packages ...string) (tree string) {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		Missing(t, "the packages of "+name+" are of amd64")
	}
	tree, _, err := Tree{
		Name:     name,
		Suites:   []string{"bookworm"},
		Packages: func(ctx context.Context, a *Apt) ([]string, error) { return a.Needed(ctx, packages...) },
		Unpack:   unpack,
		Key:      "1",
		Fresh:    30 * 24 * time.Hour,
	}.Fetch(context.WithoutCancel(t.Context()))
	if _, ok := errors.AsType[ArchiveError](err); ok {
		Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
