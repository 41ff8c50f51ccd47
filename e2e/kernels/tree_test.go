package kernels

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
)

// tree is a folder with an unpacked kernel: vmlinux, lib/modules/RELEASE, and the
// list packages, which says where it comes from.
type tree string

func (k tree) path(name string) string { return filepath.Join(string(k), name) }

// modules is the folder of the modules, named by the kernel's release.
func (k tree) modules() (string, error) {
	dirs, err := filepath.Glob(k.path("lib/modules/*"))
	if err == nil && len(dirs) != 1 {
		err = fmt.Errorf("kernel in %s: %d folders of modules, want one", k, len(dirs))
	}
	if err != nil {
		return "", err
	}
	return dirs[0], nil
}

// wanted matches the files of the packages that a gateway may need: 60 MB of 400.
// Recent packages have the kernel image beside the modules, not in boot.
var wanted = regexp.MustCompile(`^\./(usr/)?(boot/vmlinuz-|lib/modules/[^/]+/(vmlinuz$|modules\.(order|builtin)|` +
	`kernel/(net|lib|crypto|arch|drivers/(virtio|net/[^/]+\.ko|net/bonding)|fs/(9p|netfs|fscache|overlayfs))))`)

// unpack unpacks the files that match wanted from the packages in the folder debs.
func (k tree) unpack(ctx context.Context, debs string, wanted *regexp.Regexp) error {
	files, err := filepath.Glob(filepath.Join(debs, "*.deb"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if err := k.unpackOne(ctx, f, wanted); err != nil {
			return fmt.Errorf("unpack %s: %w", filepath.Base(f), err)
		}
	}
	modules, err := k.modules()
	if err != nil {
		return err
	}
	return command(ctx, nil, io.Discard, "depmod", "-b", string(k), filepath.Base(modules))
}

// unpackOne unpacks the wanted files of one package, those of usr beside the others.
func (k tree) unpackOne(ctx context.Context, deb string, wanted *regexp.Regexp) error {
	r, w := io.Pipe()
	go func() { w.CloseWithError(command(ctx, nil, w, "dpkg-deb", "--fsys-tarfile", deb)) }()
	defer r.Close()
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		link := h.Typeflag == tar.TypeSymlink
		if h.Typeflag != tar.TypeReg && !link || !wanted.MatchString(h.Name) {
			continue
		}
		path := k.path(strings.TrimPrefix(strings.TrimPrefix(h.Name, "./"), "usr/"))
		if strings.HasPrefix(filepath.Base(path), "vmlinuz") {
			path = k.path("vmlinuz")
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if link {
			if err := os.Symlink(h.Linkname, path); err != nil {
				return err
			}
			continue
		}
		b, err := io.ReadAll(t)
		if err != nil {
			return err
		}
		if err := os.WriteFile(path, b, h.FileInfo().Mode().Perm()); err != nil {
			return err
		}
	}
}

// unpackImage extracts the kernel from a bzImage (the kernel's
// Documentation/arch/x86/boot.rst), so that it starts at once through PVH.
// Unpacking itself would take an emulated CPU half a minute.
func unpackImage(ctx context.Context, from, to string) error {
	const setupSects, magic, payloadOffset, payloadLength = 0x1f1, 0x202, 0x248, 0x24c
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if len(b) < 0x1000 || string(b[magic:magic+4]) != "HdrS" {
		return fmt.Errorf("unpack %s: no Linux kernel image", from)
	}
	start := (int64(b[setupSects])+1)*512 + int64(binary.LittleEndian.Uint32(b[payloadOffset:]))
	end := start + int64(binary.LittleEndian.Uint32(b[payloadLength:]))
	if end > int64(len(b)) || end-start < 8 {
		return errors.New("the payload is cut off")
	}
	payload := b[start : end-4] // the unpacked size is behind it
	var tool string
	switch {
	case bytes.HasPrefix(payload, []byte("\xfd7zXZ")):
		tool = "xz"
	case bytes.HasPrefix(payload, []byte("\x28\xb5\x2f\xfd")):
		tool = "zstd"
	default:
		return errors.New("the compression is neither xz nor zstd")
	}
	f, err := os.Create(to)
	if err != nil {
		return err
	}
	return errors.Join(command(ctx, bytes.NewReader(payload), f, tool, "-dc"), f.Close(), os.Remove(from))
}

// command runs a program; its error includes the program's standard error.
func command(ctx context.Context, in io.Reader, out io.Writer, name string, args ...string) error {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = in, out, &stderr
	if err := cmd.Run(); err != nil {
		line, _, _ := strings.Cut(strings.TrimSpace(stderr.String()), "\n")
		return fmt.Errorf("run %s: %w: %s", name, err, line)
	}
	return nil
}
