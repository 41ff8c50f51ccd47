package config

import (
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxFile is the size of the largest file that is read. For comparison: 20,000 prefixes
	// take 0.5 MB.
	maxFile = 16 << 20

	// readTime limits the wait for a file system, such as NFS without its server.
	readTime = 5 * time.Second

	// maxReads limits the concurrent reads. A read that hangs holds a thread, and nothing
	// can end it. There is room for the reloads of a user who repairs the file or replaces
	// it: whether the path leads elsewhere by now shows only when it is read.
	maxReads = 64
)

var errSlow = fmt.Errorf("its file system does not answer within %v: mount it again, or move the file", readTime)

// readFile returns the contents of the file at path. Errors do not contain the path.
func readFile(path string) ([]byte, error) {
	return within(time.After(readTime), func() ([]byte, error) { return readRegular(path) })
}

// reading has an element for each read that is under way.
var reading = make(chan struct{}, maxReads)

// within returns the result of read, or errSlow if end fires first; then read may still be
// running.
func within(end <-chan time.Time, read func() ([]byte, error)) ([]byte, error) {
	select {
	case reading <- struct{}{}:
	case <-end:
		return nil, errSlow
	}
	type result struct {
		data []byte
		err  error
	}
	done := make(chan result, 1)
	go func() {
		defer func() { <-reading }()
		data, err := read()
		done <- result{data, err}
	}()
	select {
	case r := <-done:
		return r.data, r.err
	case <-end:
		return nil, errSlow
	}
}

// readRegular reads a regular file. It does not wait for the writer of a named pipe or the
// holder of a lease.
func readRegular(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case info.IsDir():
		return nil, unix.EISDIR
	case !info.Mode().IsRegular():
		return nil, errors.New("it is a pipe, a socket or a device")
	}
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(data) > maxFile {
		err = fmt.Errorf("it is larger than %d MiB", maxFile>>20)
	}
	return data, err
}
