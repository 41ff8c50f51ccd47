package kernels

import (
	"context"
	"errors"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
)

// A machine is another machine than the host, emulated with Debian's kernel and programs
// for it.
type machine struct {
	arch    string    // Debian's name
	goarch  string    // Go's name
	image   string    // the package that depends on the newest kernel
	qemu    [2]string // the program and its Debian package
	options []string  // of QEMU
	console string    // the device to which the kernel's console and the selftest write
}

// machines have what no kernel for amd64 has: 32 bits, the other order of bytes (s390x), or
// netlink messages in which each u64 is aligned (mipsel).
var machines = map[string]machine{
	"armhf": {
		arch: "armhf", goarch: "arm", image: "linux-image-armmp",
		qemu:    [2]string{"qemu-system-arm", "qemu-system-arm"},
		options: []string{"-machine", "virt", "-cpu", "cortex-a15"}, console: "ttyAMA0",
	},
	"mipsel": {
		arch: "mipsel", goarch: "mipsle", image: "linux-image-4kc-malta",
		qemu:    [2]string{"qemu-system-mipsel", "qemu-system-mips"},
		options: []string{"-machine", "malta", "-cpu", "24Kf"}, console: "ttyS0",
	},
	"s390x": {
		arch: "s390x", goarch: "s390x", image: "linux-image-s390x",
		qemu:    [2]string{"qemu-system-s390x", "qemu-system-misc"},
		options: []string{"-machine", "s390-ccw-virtio", "-cpu", "max"}, console: "ttysclp0",
	},
}

// selftestTime bounds the time of one guest. It takes a minute and a half on an otherwise
// idle machine.
const selftestTime = 15 * time.Minute

// wantedPrograms matches what the selftest runs, with the libraries.
var wantedPrograms = regexp.MustCompile(`^\./(usr/)?(s?bin/(busybox|conntrack|ip|nft)$|lib/([^/]+-linux-[^/]+/)?[^/]+\.so[^/]*$)`)

// source is the source of the machine's kernel and programs.
func (m machine) source() debian.Tree {
	wanted := regexp.MustCompile(wanted.String() + "|" + wantedPrograms.String())
	return debian.Tree{
		Name: "kernels/" + m.arch,
		// Not all of these machines have security updates.
		Suites: []string{"bookworm"},
		Arch:   m.arch,
		Packages: func(ctx context.Context, a *debian.Apt) ([]string, error) {
			kernel, err := packagesOf(ctx, a, m.image)
			if err != nil {
				return nil, err
			}
			programs, err := a.Needed(ctx, "busybox-static", "conntrack", "iproute2", "nftables")
			return append(kernel, programs...), err
		},
		Unpack: func(ctx context.Context, debs, dir string) error { return tree(dir).unpack(ctx, debs, wanted) },
		Key:    wanted.String(),
		Fresh:  24 * time.Hour,
	}
}

var (
	ended = regexp.MustCompile(`(?m)^selftest: exit status (\d+)\r?$`)
	// A selftest without one of the backends passes, but these kernels have both.
	passed = regexp.MustCompile(`(?m)^pass  (expect|nft): `)
	bad    = regexp.MustCompile(`(?m)^(FAIL|none)  .*`)
)

// testMachine runs the selftest on a machine.
func testMachine(t *testing.T, m machine, root string) {
	require(t, m.qemu)
	k := fetch(t, m.source())
	v := &vm{dir: t.TempDir(), exited: make(chan struct{})}
	m.build(t, root, v.path("conenatd"))
	if err := k.writeOwnImage(v.path("conenatd"), v.path("initramfs")); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := v.qemu(t, m.qemu[0], append(slices.Clone(m.options),
		"-no-user-config", "-nodefaults", "-no-reboot", "-display", "none", "-accel", "tcg", "-m", "1024",
		"-kernel", k.path("vmlinuz"), "-initrd", v.path("initramfs"),
		"-append", "console="+m.console+" panic=-1 quiet nokaslr",
		"-serial", "file:"+escape(v.path("console")))...); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), selftestTime)
	defer cancel()
	select {
	case <-v.exited:
	case <-ctx.Done():
		t.Fatal(v.withOutput(errors.New("the selftest does not end in time")))
	}
	b, err := os.ReadFile(v.path("console"))
	if err != nil {
		t.Fatal(err)
	}
	if err := judge(string(b)); err != nil {
		t.Fatal(v.withOutput(err))
	}
	t.Logf("%d checks of the selftest passed in %v", len(passed.FindAll(b, -1)), time.Since(began).Round(time.Second))
}

// judge returns an error unless a selftest with this output passed, with each backend.
func judge(console string) error {
	status := ended.FindStringSubmatch(console)
	backends := make(map[string]bool)
	for _, p := range passed.FindAllStringSubmatch(console, -1) {
		backends[p[1]] = true
	}
	switch {
	case status == nil:
		return errors.New("the guest ended before its selftest did")
	case status[1] != "0" || bad.MatchString(console):
		return errors.New("the selftest failed: " + strings.Join(bad.FindAllString(console, -1), "; "))
	case !maps.Equal(backends, map[string]bool{"expect": true, "nft": true}):
		return errors.New("the selftest did not try both backends")
	}
	return nil
}

// build builds the program for the machine, as a user would.
func (m machine) build(t *testing.T, root, program string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "make", "-s", "GOARCH="+m.goarch, "PROGRAM="+program, "build")
	cmd.Dir = filepath.Clean(root)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build for %s: %v\n%s", m.goarch, err, out)
	}
}
