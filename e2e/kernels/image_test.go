package kernels

import (
	"bytes"
	"context"
	_ "embed"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed init.sh
var initScript []byte

//go:embed serve.sh
var serveScript []byte

//go:embed selftest.sh
var selftestScript []byte

// bootModules are the modules that the guest needs to read the host's file system.
var bootModules = []string{"virtio_pci", "9pnet_virtio", "9p", "overlay"}

// writeImage writes the guest's first file system (initramfs).
func (k tree) writeImage(ctx context.Context, path string) error {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return err
	}
	program, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	a := new(archive)
	for _, dir := range []string{"bin", "dev", "proc", "sys", "modules"} {
		a.add(dir, fs.ModeDir|0o755, nil)
	}
	a.add("bin/busybox", 0o755, program)
	for _, name := range []string{
		"sh", "cat", "cp", "insmod", "mkdir", "mount", "poweroff", "switch_root", "umount", "uname",
	} {
		a.add("bin/"+name, fs.ModeSymlink|0o777, []byte("busybox"))
	}
	a.add("init", 0o755, initScript)
	a.add("serve.sh", 0o755, serveScript)
	if err := k.addModules(ctx, a); err != nil {
		return err
	}
	return os.WriteFile(path, a.end(), 0o644)
}

// writeOwnImage writes the file system of a guest that has no other: all files of the tree
// but its kernel, and program as /bin/conenatd, which the guest runs for the selftest.
func (k tree) writeOwnImage(program, path string) error {
	conenatd, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	a := new(archive)
	if err := a.addTree(string(k), func(name string) bool { return name != "vmlinuz" }); err != nil {
		return err
	}
	for _, dir := range []string{"dev", "proc", "run", "sys", "tmp"} {
		a.add(dir, fs.ModeDir|0o755, nil)
	}
	for _, name := range []string{"bin/sh", "bin/mount", "bin/poweroff", "bin/stty", "sbin/modprobe"} {
		a.add(name, fs.ModeSymlink|0o777, []byte("/bin/busybox"))
	}
	a.add("bin/conenatd", 0o755, conenatd)
	a.add("init", 0o755, selftestScript)
	return os.WriteFile(path, a.end(), 0o644)
}

// addModules adds the unpacked boot modules, and the order to load them.
func (k tree) addModules(ctx context.Context, a *archive) error {
	dir, err := k.modules()
	if err != nil {
		return err
	}
	dep, err := os.ReadFile(filepath.Join(dir, "modules.dep"))
	if err != nil {
		return err
	}
	var order []string
	done := make(map[string]bool)
	for _, name := range bootModules {
		for _, file := range withDependencies(string(dep), name) {
			if done[file] {
				continue
			}
			done[file] = true
			module, err := readModule(ctx, filepath.Join(dir, file))
			if err != nil {
				return err
			}
			order = append(order, moduleName(file))
			a.add("modules/"+moduleName(file), 0o644, module)
		}
	}
	a.add("modules/order", 0o644, []byte(strings.Join(order, "\n")))
	return nil
}

// withDependencies returns a module's file and those that it depends on, in load
// order. It returns none for a module that is built into the kernel.
func withDependencies(dep, name string) []string {
	for line := range strings.Lines(dep) {
		file, needs, _ := strings.Cut(line, ":")
		if moduleName(file) != name {
			continue
		}
		files := []string{file}
		for _, n := range strings.Fields(needs) { // dependencies are listed last first
			files = append([]string{n}, files...)
		}
		return files
	}
	return nil
}

// moduleName is the name without folder and suffix, for example of overlay.ko.xz.
func moduleName(file string) string {
	name, _, _ := strings.Cut(filepath.Base(file), ".")
	return name
}

func readModule(ctx context.Context, path string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil || filepath.Ext(path) == ".ko" {
		return b, err
	}
	tool := strings.TrimPrefix(filepath.Ext(path), ".")
	if tool == "zst" {
		tool = "zstd"
	}
	var out bytes.Buffer
	err = command(ctx, bytes.NewReader(b), &out, tool, "-dc")
	return out.Bytes(), err
}

// archive builds a cpio archive in the "newc" format (the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst).
type archive struct {
	b    bytes.Buffer
	last int // inode number of the last file
}

func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	kind := uint32(0o100000)
	switch mode.Type() {
	case fs.ModeDir:
		kind = 0o040000
	case fs.ModeSymlink:
		kind = 0o120000
	}
	a.last++
	fmt.Fprintf(&a.b, "070701")
	for _, field := range []uint32{
		uint32(a.last), kind | uint32(mode.Perm()), 0, 0, 1, 0, uint32(len(data)),
		0, 0, 0, 0, uint32(len(name) + 1), 0,
	} {
		fmt.Fprintf(&a.b, "%08X", field)
	}
	a.b.WriteString(name + "\x00")
	a.pad()
	a.b.Write(data)
	a.pad()
}

// addTree adds the files below dir whose names, relative to it, are wanted.
func (a *archive) addTree(dir string, wanted func(name string) bool) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil || !wanted(name) {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		var data []byte
		switch d.Type() {
		case fs.ModeSymlink:
			var target string
			target, err = os.Readlink(path)
			data = []byte(target)
		case 0:
			data, err = os.ReadFile(path)
		}
		a.add(name, info.Mode(), data)
		return err
	})
}

func (a *archive) pad() {
	for a.b.Len()%4 != 0 {
		a.b.WriteByte(0)
	}
}

func (a *archive) end() []byte {
	a.add("TRAILER!!!", 0, nil)
	return a.b.Bytes()
}
