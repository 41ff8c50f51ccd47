package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// buildRoot has stand-ins for the parts of OpenWrt's build system that the Makefile of the
// package includes: as much of their interface as it uses.
var buildRoot = map[string]string{
	"rules.mk": `
INCLUDE_DIR:=$(TOPDIR)/include
INSTALL_DIR:=install -d -m0755
INSTALL_BIN:=install -m0755
INSTALL_CONF:=install -m0600
INSTALL_DATA:=install -m0644
`,
	"include/package.mk": `
define BuildPackage
$(eval $(Package/$(1)))
depends:
	@echo '$(DEPENDS)'
configure:
	$$(Build/Configure)
install:
	$$(call Package/$(1)/install,$$(DESTDIR))
endef
`,
	"feeds/packages/lang/golang/golang-package.mk": `
GO_ARCH_DEPENDS:=@mips
GoBinPackage=
GoPackage/Build/Configure=
define GoPackage/Package/Install/Bin
	install -D -m0755 $(PROGRAM) $(1)/usr/bin/conenatd
endef
`,
}

// A feed is the folder of the package in a build root of OpenWrt.
type feed struct {
	*testing.T
	top string
}

func newFeed(t *testing.T) feed {
	t.Helper()
	need(t, "make", "make")
	f := feed{t, t.TempDir()}
	for name, text := range buildRoot {
		path := filepath.Join(f.top, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.CopyFS(f.folder(), os.DirFS("openwrt/conenatd")); err != nil {
		t.Fatal(err)
	}
	return f
}

func (f feed) folder() string { return filepath.Join(f.top, "feeds/packages/net/conenatd") }

// make makes a target, with the source at a path, and returns what it prints.
func (f feed) make(target, source string, variables ...string) string {
	f.Helper()
	c := exec.CommandContext(f.Context(), "make", append([]string{"-s", "-C", f.folder(), target, "TOPDIR=" + f.top, "PKG_BUILD_DIR=" + source}, variables...)...)
	c.Env = slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "MAKE") || strings.HasPrefix(v, "GOFLAGS=") })
	out, err := c.CombinedOutput()
	if err != nil {
		f.Fatalf("make %s: %v\n%s", target, err, out)
	}
	return string(out)
}

// Fails when conenatd advises a kernel module that its own package does not bring. Labels are
// a part of nf_conntrack; the module that is named for them only selects it.
func TestOpenWrtPackageBringsTheModules(t *testing.T) {
	depends := strings.Fields(newFeed(t).make("depends", "."))
	advised := map[string]bool{"kmod-nf-conntrack-netlink": true, "kmod-nfnetlink-cthelper": true}
	for _, file := range []string{"../internal/rules/probe.go", "../internal/gateway/sockets.go"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range regexp.MustCompile(`kmod-[a-z-]+`).FindAllString(string(text), -1) {
			advised[name] = name != "kmod-ipt-conntrack-label"
		}
	}
	if len(advised) < 8 {
		t.Fatalf("only %v", advised)
	}
	for name, needed := range advised {
		if needed != slices.Contains(depends, "+"+name) {
			t.Errorf("needed is %v for %s, and the package depends on %q", needed, name, depends)
		}
	}
}

// Fails when a file is missing in the package, or cannot be run.
func TestOpenWrtPackageHasItsFiles(t *testing.T) {
	source, err := filepath.Abs("..")
	if err != nil {
		t.Fatal(err)
	}
	dest := t.TempDir()
	newFeed(t).make("install", source, "DESTDIR="+dest, "PROGRAM="+program)
	for name, mode := range map[string]os.FileMode{
		"usr/bin/conenatd": 0o755, "etc/init.d/conenatd": 0o755, "etc/config/conenatd": 0o600, "etc/sysctl.d/30-conenatd.conf": 0o644,
	} {
		info, err := os.Stat(filepath.Join(dest, name))
		if err != nil || info.Mode() != mode || info.Size() == 0 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
}

// Fails when the library that does not compile for 32-bit machines is not the corrected copy.
func TestOpenWrtPackageCompilesFor32Bits(t *testing.T) {
	source := t.TempDir()
	for _, name := range []string{"internal", "scripts"} {
		if err := os.CopyFS(filepath.Join(source, name), os.DirFS("../"+name)); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile("../" + name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(source, name), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	newFeed(t).make("configure", source)
	c := exec.CommandContext(t.Context(), "go", "build", "github.com/google/nftables")
	c.Dir = source
	c.Env = append(os.Environ(), "GOFLAGS=", "GOARCH=386")
	if out, err := c.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}
