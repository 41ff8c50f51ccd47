package nftversions

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/internal/lab"
)

// suites are Debian's releases, oldest first. Its archive has no other version of nft,
// not even in backports.
var suites = []string{"bullseye", "bookworm", "trixie", "sid"}

// programsEnv lists the paths of more nft programs to try, such as those of other
// distributions.
const programsEnv = "CONENATD_NFT"

// An nft is Debian's nft of one release, unpacked, with that release's C library; or
// another program.
type nft struct {
	suite   string
	tree    string
	program string // used instead of a tree
	version [3]int
	newest  *nft // the newest release's; its C library works for all programs
}

func (n *nft) String() string {
	return fmt.Sprintf("%s %d.%d.%d", n.suite, n.version[0], n.version[1], n.version[2])
}

// before reports whether nft is older than a version.
func (n *nft) before(major, minor, patch int) bool {
	return slices.Compare(n.version[:], []int{major, minor, patch}) < 0
}

// versions fetches each nft, once: 23 MB in all from the archive; later runs use the
// cache.
var versions = sync.OnceValues(func() ([]*nft, error) {
	type result struct {
		n   *nft
		err error
	}
	results := make([]result, len(suites))
	var all sync.WaitGroup
	for i, suite := range suites {
		all.Go(func() { results[i].n, results[i].err = get(suite) })
	}
	all.Wait()
	var list []*nft
	for _, r := range results {
		if r.err != nil {
			return nil, r.err
		}
		list = append(list, r.n)
	}
	for _, path := range strings.Fields(os.Getenv(programsEnv)) {
		n := &nft{suite: filepath.Base(path), program: path}
		if err := n.identify(); err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	for _, n := range list {
		n.newest = list[len(suites)-1]
	}
	return list, nil
})

// eachNFT returns all versions. If the archive cannot be reached it skips the test, but
// in CI the test must run.
func eachNFT(t *testing.T) []*nft {
	t.Helper()
	list, err := versions()
	if _, ok := errors.AsType[debian.ArchiveError](err); ok {
		debian.Missing(t, err.Error())
	}
	if err != nil {
		t.Fatal(err)
	}
	return list
}

func get(suite string) (*nft, error) {
	if runtime.GOARCH != "amd64" {
		return nil, debian.ArchiveError{Err: errors.New("the packages are of amd64")}
	}
	// The ignored error says that an old tree is used because the archive cannot be
	// reached.
	tree, _, err := debian.Tree{
		Name:     "nft/" + suite,
		Suites:   []string{suite},
		Packages: packages,
		Unpack:   debian.UnpackAll,
		Key:      "1",
		Fresh:    7 * 24 * time.Hour,
	}.Fetch(context.Background())
	if err != nil {
		return nil, fmt.Errorf("nft of %s: %w", suite, err)
	}
	n := &nft{suite: suite, tree: tree}
	return n, n.identify()
}

// identify sets the version.
func (n *nft) identify() error {
	path, args := n.command("--version")
	out, err := exec.Command(path, args...).Output()
	if err != nil {
		return fmt.Errorf("run nft of %s: %w", n.suite, err)
	}
	m := versionWord.FindStringSubmatch(string(out))
	if m == nil {
		return fmt.Errorf("nft of %s: no version in %q", n.suite, out)
	}
	for i := range n.version {
		n.version[i], _ = strconv.Atoi(m[1+i])
	}
	return nil
}

var versionWord = regexp.MustCompile(`v(\d+)\.(\d+)\.(\d+)`)

func packages(ctx context.Context, a *debian.Apt) ([]string, error) {
	names, err := a.Needed(ctx, "nftables")
	return append(names, "python3-nftables"), err // this machine's Python runs it
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// command returns what runs nft with args.
func (n *nft) command(args ...string) (path string, all []string) {
	if n.program != "" {
		return n.program, args
	}
	return debian.Program(n.tree, "usr/sbin/nft", args...)
}

// nftTime bounds a run of nft; each takes some ten milliseconds.
const nftTime = time.Minute

// run runs nft in a namespace with text as its standard input.
func (n *nft) run(ns *lab.Namespace, text string, args ...string) (out string, err error) {
	path, args := n.command(args...)
	return execute(ns, text, nil, path, args...)
}

// execute runs a program in a namespace. Any output on standard error is an error.
func execute(ns *lab.Namespace, text string, env []string, path string, args ...string) (out string, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), nftTime)
	defer cancel()
	var stdout, stderr strings.Builder
	cmd := ns.Command(ctx, path, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(text), &stdout, &stderr
	cmd.Env = append(os.Environ(), env...)
	err = cmd.Run()
	// Before 1.0.7, JSON gives a statement that adds to a map only as text, with a warning.
	words := strings.ReplaceAll(stderr.String(), noJSON, "")
	if err != nil || words != "" {
		err = fmt.Errorf("%w: %.1000s", cmp.Or(err, errWords), words)
	}
	return stdout.String(), err
}

const noJSON = "warning: stmt ops map have no json callback\n"

var errWords = errors.New("complains")
