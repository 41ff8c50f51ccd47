package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Fails, by hanging, when a pipe or a file without an end is read.
func TestFilesThatBlockOrNeverEndAreRefused(t *testing.T) {
	dir := t.TempDir()
	pipe, large := filepath.Join(dir, "pipe"), filepath.Join(dir, "large")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(large, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(large, maxFile+1); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		pipe:        "it is a pipe, a socket or a device",
		"/dev/zero": "it is a pipe, a socket or a device",
		large:       "it is larger than 16 MiB",
	} {
		_, err := Load(path)
		if want = path + ": expected a readable file: " + want; err == nil || err.Error() != want || IsUsage(err) {
			t.Errorf("\n got %v\nwant %s", err, want)
		}
	}
}

// Fails when a file system that does not answer blocks the caller or takes all threads.
// Hangs when after ten reloads it keeps a file on another file system from being read.
func TestAReadThatHangsIsGivenUp(t *testing.T) {
	free := make(chan struct{})
	over := make(chan time.Time)
	close(over)
	started := make(chan struct{}, maxReads)
	hang := func() ([]byte, error) {
		started <- struct{}{}
		<-free
		return nil, nil
	}
	good := func() ([]byte, error) { return []byte("x"), nil }
	const reloads = 10
	for n := range max(maxReads, reloads+1) {
		if n == reloads {
			if data, err := within(nil, good); string(data) != "x" {
				t.Errorf("beside those that hang: %q, %v", data, err)
			}
		}
		end := make(chan time.Time)
		gaveUp := make(chan error)
		go func() {
			_, err := within(end, hang)
			gaveUp <- err
		}()
		<-started
		close(end)
		if err := <-gaveUp; err == nil || !strings.Contains(err.Error(), "does not answer within 5s") {
			t.Fatal(err)
		}
	}
	if _, err := within(over, hang); err == nil || len(started) > 0 {
		t.Errorf("%d more began: %v", len(started), err)
	}
	close(free)
	if data, err := within(nil, good); string(data) != "x" {
		t.Errorf("%q, %v", data, err)
	}
}
