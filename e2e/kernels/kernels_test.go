// Package kernels runs tests on Debian's own kernels, in QEMU. This machine's kernel may
// lack some of their features (nfnetlink_cthelper, flowtables), or behave differently. "make
// kernels" starts it.
//
// A guest for amd64 sees the host's files read-only: programs, libraries, this folder. Without
// hardware virtualisation it is five to ten times slower. A guest of another machine has
// that machine's programs, and runs the selftest.
package kernels

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
)

const (
	// kernelsEnv lists the kernels for amd64 and the other machines, such as "5.10 6.1 armhf".
	kernelsEnv = "CONENATD_KERNELS"
	// commandEnv is a command line to run instead of the tests, such as
	// "cd /src/conenatd/e2e && e2e.test -test.v -test.run TestDemo".
	commandEnv = "CONENATD_KERNELS_COMMAND"
	// countEnv lets the clock of a guest for amd64 count instructions, so that a benchmark in it
	// does not depend on what else the host does. Caches cost nothing then.
	countEnv = "CONENATD_KERNELS_COUNT"
)

// tools are the required programs and their Debian packages, without QEMU.
var tools = [][2]string{
	{"busybox", "busybox-static"},
	{"depmod", "kmod"},
	{"xz", "xz-utils"},
	{"zstd", "zstd"},
	{"dpkg-deb", "dpkg"},
	{"apt-get", "apt"},
}

// A job is a command line for the guest.
type job struct {
	name, command string
	verbose       bool // show the whole output
}

// kernelTime bounds the time of one guest; 6.1 takes twenty minutes on an otherwise idle
// machine.
const kernelTime = 50 * time.Minute

// packages are the packages whose tests run in a guest.
var packages = []string{
	"e2e/kernels/guest", "internal/expect", "internal/ctwatch", "internal/gateway", "internal/rules", "internal/userrules", "e2e",
}

// half selects the tests of internal/rules for which the other guest has time.
const half = `^Test[A-M]`

// reading are the tests of internal/userrules that ask something of a kernel: how it says rules,
// and how their changes are seen. The first one reads each expression, match and target. What
// follows from them is the same on all kernels, and the host tests it.
var reading = []string{
	"FirewallsAreWhatTheKernelSays",
	"ChangesOfIPTablesLegacyAreSeen", "ChildrenAreReadBesideGrants", "ChildrenNeedPrivilege", "FileThatIsLoadedAgainIsReadAgain",
	"ForwardsAreNotMissedWhileRulesChange", "ForwardsAreReadAgainOnlyIfTheyChanged", "ForwardsAreTheSameWhileOtherRulesOfTheirTableChange",
	"ForwardsForVeryManySources", "ForwardsOfIP6TablesLegacy", "ForwardsOfIPTablesLegacyAreReadAgainOnlyIfTheyChanged",
	"ForwardsThatCannotBeReadHold", "HiddenTablesOfIPTablesLegacyMayDropChildren", "HiddenTablesOfIPTablesLegacyMayHaveFixedSources",
	"IPSetsAreNotRead", "ReadingMakesNoTableOfIPTablesLegacy", "RuleForAnotherProtocolBehindOneThatRewrites",
	"SetOfAChainThatStaysIsKnown", "TablesAndChainsAreFoundByTheirNames",
}

// Fails when a test gets another name, and so would no longer run in the guests.
func TestReadingTestsExist(t *testing.T) {
	all, err := exec.Command("grep", "-rhoE", "^func Test[A-Za-z0-9]+", "../../internal/userrules", "--include=*_test.go").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range reading {
		if !slices.Contains(strings.Fields(string(all)), "Test"+name) {
			t.Errorf("internal/userrules has no Test%s", name)
		}
	}
}

// core selects the end-to-end tests for a guest: what lets packets in and keeps them out, in
// each backend, and what a daemon leaves. What auto decides by rules, it decides as on the host.
// All tests would take longer than CI may; commandEnv can run the others.
const core = `^Test(Peer|Two|IPv|Routed|Child|Answered|PermissionOutlives|Early|Guard|Stop|Restart|Cleanup|Connmark|Shared|SNAT|` +
	`Firewalls|Helper|Group|Auto(Follows|Sees|Judges|NFT)|Tables|Port|Outside|FlowIs|` +
	`NFT(Learns|Outlives|RunsOut|Second|Children|Unanswered|Stop|Restart|Group|Filtering|Hairpin|Forward|Consoles|Chain|PortPasses))`

// suspend is the last job: 9p does not survive it, so the guest loses the host's files. The
// programs must be in memory; even the host's shell could not exit. A serial port may lose
// pending output, so the log is printed afterwards.
var suspend = job{
	name: "suspend",
	command: "cd /run && export TMPDIR=/run CONENATD_SUSPEND=1 && exec ./busybox sh -c " +
		`"guest.test -test.v -test.timeout 5m -test.run 'TestSuspend$' >suspend.log 2>&1; code=\$?; ./busybox cat suspend.log; exit \$code"`,
}

// guests are the jobs of two guests that run side by side, each on one of the machine's
// CPUs. A job runs a test program in the folder of its package, as "go test" does.
func guests(root string) map[string][]job {
	if c := os.Getenv(commandEnv); c != "" {
		return map[string][]job{"one": {{name: "command", command: c, verbose: true}}}
	}
	tests := func(p, some string) job {
		return job{name: p, command: fmt.Sprintf("cd '%s' && %s.test -test.v -test.timeout 40m %s",
			filepath.Join(root, p), filepath.Base(p), some)}
	}
	return map[string][]job{
		"packages": {
			tests("e2e/kernels/guest", ""),
			tests("internal/expect", ""),
			tests("internal/ctwatch", ""),
			tests("internal/gateway", ""),
			tests("internal/userrules", "-test.run '^Test("+strings.Join(reading, "|")+")$'"),
			tests("internal/rules", "-test.run '"+half+"'"),
			suspend,
		},
		"end to end": {
			tests("e2e", "-test.run '"+core+"'"),
			tests("internal/rules", "-test.skip '"+half+"'"),
		},
	}
}

func TestKernels(t *testing.T) {
	names := strings.Fields(os.Getenv(kernelsEnv))
	if len(names) == 0 {
		debian.Missing(t, kernelsEnv+` is not set: run "make kernels", or set it to some of: `+known())
	}
	require(t, tools...)
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	var dir string
	if slices.ContainsFunc(names, func(name string) bool { return suites[name] != nil }) {
		dir = buildJob(t, root)
	}
	for _, name := range names {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m, foreign := machines[name]
			switch {
			case foreign:
				testMachine(t, m, root)
			case suites[name] == nil:
				t.Fatalf("kernel %s: want one of %s", name, known())
			default:
				testKernel(t, name, root, dir)
			}
		})
	}
}

// require ends the test if a program is missing. Each comes with its Debian package.
func require(t *testing.T, tools ...[2]string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool[0]); err != nil {
			debian.Missing(t, fmt.Sprintf("%s not found: install the Debian package %s", tool[0], tool[1]))
		}
	}
}

// testKernel runs the guests of one kernel for amd64. They get the files of the folder dir.
func testKernel(t *testing.T, version, root, dir string) {
	if runtime.GOARCH != "amd64" {
		debian.Missing(t, "the guest runs the host's programs on a kernel for amd64")
	}
	require(t, [2]string{"qemu-system-x86_64", "qemu-system-x86"})
	k := fetch(t, kernelOf(version))
	for name, jobs := range guests(root) {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			testGuest(t, k, dir, jobs)
		})
	}
}

// buildJob builds everything that the guest gets from the host, in a new folder.
func buildJob(t *testing.T, root string) string {
	t.Helper()
	dir := t.TempDir()
	args := []string{"test", "-c", "-ldflags=-s -w", "-o", dir + "/"}
	for _, p := range packages {
		args = append(args, "./"+p)
	}
	for _, args := range [][]string{args, {"build", "-ldflags=-s -w", "-o", dir + "/", "./cmd/conenatd"}} {
		cmd := exec.CommandContext(t.Context(), "go", args...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // static files, quick to load
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build: %v\n%s", err, out)
		}
	}
	environment := fmt.Sprintf("export PATH='/run/job:%s:/usr/sbin:/sbin' HOME=/root CI=1 CONENATD_EXE=/run/job/conenatd CONENATD_GUEST=1\n",
		os.Getenv("PATH"))
	if err := os.WriteFile(filepath.Join(dir, "environment"), []byte(environment), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func testGuest(t *testing.T, k tree, dir string, jobs []job) {
	began := time.Now()
	v, err := boot(t, k, dir)
	if err != nil {
		t.Fatalf("boot: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), kernelTime)
	defer cancel()
	release, _, err := v.run(ctx, "cat /proc/version")
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s booted in %v", strings.TrimSpace(release), time.Since(began).Round(100*time.Millisecond))
	// With so little memory the kernel's tables are small, and labs cannot enlarge them.
	// These sizes have room for 50,000 expectations, each with an anchor and a flow. A dump
	// visits every bucket, however few entries there are, and each test makes many.
	// nft_redir is loaded here because many tests want it at the same moment, which some
	// kernels refuse. Nothing loads the modules that the helpers of TFTP and SIP need behind NAT.
	out, code, err := v.run(ctx, "modprobe nf_conntrack hashsize=16384 expect_hashsize=1024 && modprobe nft_redir && modprobe nf_nat_tftp && modprobe nf_nat_sip && cd /proc/sys/net/netfilter && "+
		"echo 262144 >nf_conntrack_max && echo 100000 >nf_conntrack_expect_max")
	if err != nil || code != 0 {
		t.Fatalf("make room for expectations: exit status %d, %v: %s", code, err, out)
	}
	for _, j := range jobs {
		t.Run(j.name, func(t *testing.T) {
			out, code, err := v.run(ctx, j.command)
			if err != nil {
				t.Fatalf("%v\nbefore that:\n%s", err, out)
			}
			if code != 0 {
				t.Fatalf("exit status %d\n%s", code, out)
			}
			if !j.verbose {
				out = summary(out)
			}
			t.Log(out)
		})
		if v.broken {
			return
		}
	}
}

var result = regexp.MustCompile(`(?m)^--- (PASS|SKIP): (\S+)`)

// summary counts the tests in the output of a test program.
func summary(out string) string {
	passed, skipped := 0, []string{}
	for _, r := range result.FindAllStringSubmatch(out, -1) {
		if r[1] == "PASS" {
			passed++
		} else {
			skipped = append(skipped, r[2])
		}
	}
	return fmt.Sprintf("%d tests passed, %d skipped %s", passed, len(skipped), strings.Join(skipped, " "))
}
