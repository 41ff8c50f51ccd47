package audit

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Open opens the file at path for a Log. It makes the file if there is none, and takes it
// away from other users. It does not wait for the reader of a pipe, nor for a file system that
// does not answer until end fires.
func Open(end <-chan time.Time, path string) (*os.File, error) {
	f, err := within(end, func() (*os.File, error) { return open(path) }, func(f *os.File, err error) {
		if err == nil {
			_ = f.Close()
		}
	})
	if err != nil {
		return nil, fmt.Errorf("audit_log: expected a file that can be written: %w; make its folder writable for conenatd, or name another file", err)
	}
	return f, nil
}

func open(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		err = fmt.Errorf("%s: it is a pipe, a socket or a device", path)
	case info.Mode().Perm() != 0o600:
		err = f.Chmod(0o600)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}
