package audit

import (
	"bytes"
	"encoding/json"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/watch"
)

// quietAuditor returns an Auditor of a daemon whose loop has ended, and its log.
func quietAuditor() (*Auditor, *bytes.Buffer) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	noted := episodes.New(log, func() time.Duration { return 0 }, time.Minute)
	a := NewAuditor(new(watch.Watchers), noted, func(<-chan struct{}) ([]cone.Permission, bool) { return nil, false })
	a.wait = func() <-chan time.Time { return nil }
	return a, &b
}

func grantedTo(i int) cone.Event {
	return cone.Event{Kind: cone.EventGranted, Permission: cone.Permission{
		Key: cone.Key{Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(i))), Zone: uint16(i >> 16)},
	}}
}

// The loop publishes faster than the file is written.
//
// Fails when an event is neither in the file nor counted there, in the log and by status, and, by
// hanging, when the loop waits.
func TestTheAuditLogCountsWhatItLoses(t *testing.T) {
	a, log := quietAuditor()
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := a.Open(path); err != nil {
		t.Fatal(err)
	}
	w := watch.New(4)
	a.watchers.Auditor.Store(w)
	const published = 10
	for i := range published {
		a.watchers.Publish(grantedTo(i))
	}
	if n := a.Missing(); n != published-4 {
		t.Errorf("status counts %d lost while the log is behind, want %d", n, published-4)
	}
	a.start(a.opened, false, w)
	a.opened = nil
	a.Close(false)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	begins, lost := 0, 0
	for line := range strings.Lines(string(b)) {
		var r struct {
			Event string
			Lost  int
		}
		if err := json.Unmarshal([]byte(line), &r); err != nil {
			t.Fatal(err)
		}
		lost += r.Lost
		if r.Event == "mapping_begin" {
			begins++
		}
	}
	if n := a.Missing(); n != published-4 {
		t.Errorf("status counts %d lost, want %d", n, published-4)
	}
	if begins != 4 || lost != published-4 {
		t.Errorf("%d begins, %d lost of %d\n%s", begins, lost, published, b)
	}
	if want := `level=WARN msg="records of the audit log are lost" count=6`; !strings.Contains(log.String(), want) {
		t.Errorf("logged %q", log)
	}
}

// The disk of the audit log hangs, as NFS without its server does; here the file is a pipe that nobody
// reads. A reload gives another file.
//
// Fails, by hanging, when the reload or the stop waits for the disk, and when the new file gets
// nothing.
func TestAnAuditLogThatHangsHoldsNothingUp(t *testing.T) {
	a, log := quietAuditor()
	patient, over := a.wait, make(chan time.Time)
	close(over)
	impatient := func() <-chan time.Time { return over }
	hang := func() (r *os.File) {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		size, err := unix.FcntlInt(w.Fd(), unix.F_GETPIPE_SZ, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(make([]byte, size)); err != nil { // it is full
			t.Fatal(err)
		}
		a.start(w, false, watch.New(1500))
		for i := range 3000 { // 1,000 of them fill what waits to be written, 1,500 the queue
			a.watchers.Publish(grantedTo(i))
		}
		for stack := make([]byte, 1<<20); !writes(string(stack[:runtime.Stack(stack, true)])); {
			runtime.Gosched()
		}
		return r
	}
	first, firstDone := hang(), a.done
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := a.Open(path); err != nil {
		t.Fatal(err)
	}
	a.wait = impatient
	a.Use(false)
	a.wait = patient
	a.watchers.Publish(grantedTo(1))
	a.Close(false)
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), "mapping_begin") {
		t.Errorf("the new file has %q, error %v", b, err)
	}
	second, secondDone := hang(), a.done
	a.wait = impatient
	a.Close(true)
	if !strings.Contains(log.String(), ErrSlow.Error()) || a.Missing() == 0 {
		t.Errorf("%d are missing, logged %q", a.Missing(), log)
	}
	// Once the file systems answer, each record is there or counts as lost.
	there := 0
	for _, r := range []*os.File{first, second} {
		b, err := io.ReadAll(r)
		if err != nil {
			t.Error(err)
		}
		there += strings.Count(string(b), "mapping_begin")
		_ = r.Close()
	}
	<-firstDone
	<-secondDone
	if n := int(a.Missing()); there+n != 2*3000 {
		t.Errorf("%d records are there and %d missing, of %d", there, n, 2*3000)
	}
}

// writes reports whether a goroutine of these stacks writes the audit log.
func writes(stacks string) bool {
	return slices.ContainsFunc(strings.Split(stacks, "\n\n"), func(s string) bool {
		return strings.Contains(s, "audit.(*Log).write") && strings.Contains(s, "os.(*File).Write")
	})
}

// Fails when the audit log takes the place of a client, or when the kernel may hide flows
// from it.
func TestTheAuditLogIsAWatcherButNoClient(t *testing.T) {
	a, _ := quietAuditor()
	if a.watchers.Any() {
		t.Error("somebody watches")
	}
	if err := a.Open(filepath.Join(t.TempDir(), "audit.log")); err != nil {
		t.Fatal(err)
	}
	a.Use(false)
	if !a.watchers.Any() {
		t.Error("nobody watches")
	}
	for range watch.MostClients {
		if _, err := a.watchers.Add(); err != nil {
			t.Error(err)
		}
	}
	a.Use(false) // no file was opened: it is turned off
	if a.watchers.Auditor.Load() != nil {
		t.Error("it still watches")
	}
}
