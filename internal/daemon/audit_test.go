package daemon

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

	"github.com/conenatd/conenatd/internal/audit"
	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/episodes"
)

// quietShared returns what an auditor uses, without a loop, and its log.
func quietShared() (*shared, *bytes.Buffer) {
	var b bytes.Buffer
	s := &shared{log: slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug})), ended: make(chan struct{})}
	s.noted = episodes.New(s.log, func() time.Duration { return 0 }, time.Minute)
	s.auditor = &auditor{shared: s, wait: func() <-chan time.Time { return nil }}
	close(s.ended)
	return s, &b
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
	s, log := quietShared()
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := s.auditor.open(&config.Config{AuditLog: path}); err != nil {
		t.Fatal(err)
	}
	w := &watcher{events: make(chan watched, 4)}
	s.watchers.auditor.Store(w)
	const published = 10
	for i := range published {
		s.watchers.publish(grantedTo(i))
	}
	if n := s.auditor.missing(); n != published-4 {
		t.Errorf("status counts %d lost while the log is behind, want %d", n, published-4)
	}
	s.auditor.start(s.auditor.opened, false, w)
	s.auditor.opened = nil
	s.auditor.close(false)
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
	if n := s.auditor.missing(); n != published-4 {
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
	s, log := quietShared()
	patient, over := s.auditor.wait, make(chan time.Time)
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
		s.auditor.start(w, false, &watcher{events: make(chan watched, 1500)})
		for i := range 3000 { // 1,000 of them fill what waits to be written, 1,500 the queue
			s.watchers.publish(grantedTo(i))
		}
		for stack := make([]byte, 1<<20); !writes(string(stack[:runtime.Stack(stack, true)])); {
			runtime.Gosched()
		}
		return r
	}
	first, firstDone := hang(), s.auditor.done
	path := filepath.Join(t.TempDir(), "audit.log")
	if err := s.auditor.open(&config.Config{AuditLog: path}); err != nil {
		t.Fatal(err)
	}
	s.auditor.wait = impatient
	s.auditor.use(false)
	s.auditor.wait = patient
	s.watchers.publish(grantedTo(1))
	s.auditor.close(false)
	if b, err := os.ReadFile(path); err != nil || !strings.Contains(string(b), "mapping_begin") {
		t.Errorf("the new file has %q, error %v", b, err)
	}
	second, secondDone := hang(), s.auditor.done
	s.auditor.wait = impatient
	s.auditor.close(true)
	if !strings.Contains(log.String(), audit.ErrSlow.Error()) || s.auditor.missing() == 0 {
		t.Errorf("%d are missing, logged %q", s.auditor.missing(), log)
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
	if n := int(s.auditor.missing()); there+n != 2*3000 {
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
	s, _ := quietShared()
	if s.watchers.any() {
		t.Error("somebody watches")
	}
	if err := s.auditor.open(&config.Config{AuditLog: filepath.Join(t.TempDir(), "audit.log")}); err != nil {
		t.Fatal(err)
	}
	s.auditor.use(false)
	if !s.watchers.any() {
		t.Error("nobody watches")
	}
	for range mostWatchers {
		if _, err := s.watchers.add(); err != nil {
			t.Error(err)
		}
	}
	s.auditor.use(false) // no file was opened: it is turned off
	if s.watchers.auditor.Load() != nil {
		t.Error("it still watches")
	}
}

// Fails when a permission that comes or goes is not logged at debug, or is above.
func TestGrantsAreLoggedAtDebug(t *testing.T) {
	s, log := quietShared()
	s.observe(grantedTo(5060))
	s.observe(cone.Event{Kind: cone.EventRevoked, Permission: grantedTo(5060).Permission, Reason: cone.ReasonStopped})
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "level=DEBUG msg=granted ") || !strings.Contains(lines[0], "ext=198.51.100.1:5060") ||
		!strings.Contains(lines[1], "level=DEBUG msg=revoked ") || !strings.Contains(lines[1], "reason="+cone.ReasonStopped.String()) {
		t.Errorf("logged %q", lines)
	}
}
