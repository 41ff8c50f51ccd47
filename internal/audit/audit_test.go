package audit

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A disk holds what is written until it is full.
type disk struct {
	text string
	room int // -1 is without limit
	most int // bytes in one write
}

func (d *disk) Write(b []byte) (int, error) {
	d.most = max(d.most, len(b))
	if d.room < 0 || len(b) <= d.room {
		d.text += string(b)
		return len(b), nil
	}
	d.text += string(b[:d.room])
	return d.room, errors.New("no space left")
}

func (d *disk) Close() error { return nil }

var at = time.Date(2026, 11, 27, 13, 0, 0, 7_000_000, time.UTC)

func end(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }

func permission(peer string) cone.Permission {
	return cone.Permission{
		Key: cone.Key{Ext: end("198.51.100.1:6000"), Peer: cone.AddrFrom(netip.MustParseAddr(peer))},
		Int: end("10.0.0.1:5060"),
	}
}

func granted(peer string) *cone.Event {
	return &cone.Event{Kind: cone.EventGranted, Permission: permission(peer)}
}

func revoked(peer string) *cone.Event {
	return &cone.Event{Kind: cone.EventRevoked, Permission: permission(peer)}
}

const (
	begin  = `{"time":"2026-11-27T13:00:00.007Z","event":"mapping_begin","protocol":"udp","inside":"10.0.0.1:5060","outside":"198.51.100.1:6000"}` + "\n"
	finish = `{"time":"2026-11-27T13:00:00.007Z","event":"mapping_end","protocol":"udp","inside":"10.0.0.1:5060","outside":"198.51.100.1:6000"}` + "\n"
	gap2   = `{"time":"2026-11-27T13:00:00.007Z","event":"lost","lost":2}` + "\n"
)

// written returns what a Log with this history has written.
func written(t *testing.T, peers bool, history func(*Log)) string {
	t.Helper()
	d := &disk{room: -1}
	l := New(d, peers)
	history(l)
	if _, err := l.Close(at); err != nil {
		t.Fatal(err)
	}
	return d.text
}

// Fails when each permission is a mapping, and when an event that comes twice counts twice.
func TestAMappingBeginsWithItsFirstPermissionAndEndsWithItsLast(t *testing.T) {
	got := written(t, false, func(l *Log) {
		for _, e := range []*cone.Event{
			granted("203.0.113.5"), granted("203.0.113.5"), granted("203.0.113.6"),
			revoked("203.0.113.5"), revoked("203.0.113.5"), revoked("203.0.113.6"), revoked("203.0.113.7"),
		} {
			l.Observe(at, e)
		}
	})
	if got != begin+finish {
		t.Errorf("got\n%s", got)
	}
}

// Fails when a peer is written although nobody asked for it (RFC 6888 REQ-12), and when the
// record of a child lacks a field.
func TestPeersAreWrittenOnlyWhereAskedFor(t *testing.T) {
	child := &cone.Event{Kind: cone.EventChild, Permission: permission("203.0.113.5"), From: end("203.0.113.5:5070")}
	gone := &cone.Event{Kind: cone.EventChildGone, Permission: permission("203.0.113.5"), From: end("203.0.113.5:5070")}
	const one = `{"time":"2026-11-27T13:00:00.007Z","event":"child_begin","protocol":"udp","inside":"10.0.0.1:5060","outside":"198.51.100.1:6000"`
	for peers, rest := range map[bool]string{false: "}\n", true: `,"peer":"203.0.113.5:5070"}` + "\n"} {
		got := written(t, peers, func(l *Log) { l.Observe(at, child); l.Observe(at, gone) })
		if want := one + rest + strings.Replace(one, "begin", "end", 1) + rest; got != want {
			t.Errorf("peers %v: got\n%swant\n%s", peers, got, want)
		}
	}
}

// Fails when a mapping whose end was lost never ends, or one whose begin was lost has none.
func TestSyncMakesGoodWhatWasLost(t *testing.T) {
	other := permission("203.0.113.9")
	other.Int, other.Ext = end("10.0.0.2:1"), end("198.51.100.1:1")
	got := written(t, false, func(l *Log) {
		l.Observe(at, granted("203.0.113.5"))
		l.Lost(at, 2)
		l.Sync(at, []cone.Permission{other})
		l.End(at)
	})
	second := strings.NewReplacer("10.0.0.1:5060", "10.0.0.2:1", "1:6000", "1:1")
	if want := begin + gap2 + finish + second.Replace(begin) + second.Replace(finish); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// Fails when records that a full disk refused are not counted, when the file does not tell
// it later, and when the next record continues a line that was cut.
func TestAFullDiskCostsRecordsThatAreCounted(t *testing.T) {
	d := &disk{room: 20}
	l := New(d, false)
	l.Observe(at, granted("203.0.113.5"))
	l.Observe(at, revoked("203.0.113.5"))
	if n, err := l.Flush(at); n != 2 || err == nil {
		t.Fatalf("lost %d, %v", n, err)
	}
	d.room = -1
	l.Observe(at, granted("203.0.113.5"))
	if n, err := l.Flush(at); n != 0 || err != nil {
		t.Fatalf("lost %d, %v", n, err)
	}
	if want := begin[:20] + "\n" + gap2 + begin; d.text != want {
		t.Errorf("got\n%swant\n%s", d.text, want)
	}
}

// Fails when the records of all mappings wait in memory before they are written, or when some
// are lost on the way without a word.
func TestManyMappingsAreWrittenInPieces(t *testing.T) {
	const many = 10_000
	var all []cone.Permission
	for i := range many {
		p := permission("203.0.113.5")
		p.Ext.Port = uint16(1 + i)
		all = append(all, p)
	}
	d := &disk{room: -1}
	l := New(d, false)
	l.Sync(at, all)
	l.Sync(at, nil)
	l.Sync(at, all)
	l.End(at)
	if n, err := l.Flush(at); n != 0 || err != nil {
		t.Fatalf("lost %d, %v", n, err)
	}
	if n := strings.Count(d.text, "\n"); n != 4*many {
		t.Errorf("%d records, want %d", n, 4*many)
	}
	if d.most > flushAt+len(begin) {
		t.Errorf("%d bytes in one write", d.most)
	}

	d = &disk{}
	l = New(d, false)
	l.Sync(at, all)
	if n, err := l.Flush(at); n != many || err == nil {
		t.Errorf("a full disk: lost %d, %v", n, err)
	}
}

func TestReplaceLeavesTheOldFile(t *testing.T) {
	one, two := &disk{room: -1}, &disk{room: -1}
	l := New(one, false)
	l.Observe(at, granted("203.0.113.5"))
	_, _ = l.Flush(at)
	if err := l.Replace(nil, two, false); err != nil {
		t.Fatal(err)
	}
	l.Observe(at, revoked("203.0.113.5"))
	_, _ = l.Flush(at)
	if one.text != begin || two.text != finish {
		t.Errorf("got\n%sand\n%s", one.text, two.text)
	}
}

// Fails when other users may read the file, when a file is emptied, and, by hanging, when a
// pipe is opened.
func TestTheFileIsForItsOwnerAlone(t *testing.T) {
	dir := t.TempDir()
	path, pipe, link := filepath.Join(dir, "log"), filepath.Join(dir, "pipe"), filepath.Join(dir, "link")
	if err := os.WriteFile(path, []byte("old\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	f, err := Open(nil, path)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteString("new\n")
	_ = f.Close()
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if b, _ := os.ReadFile(path); string(b) != "old\nnew\n" {
		t.Errorf("got %q", b)
	}
	if err := errors.Join(unix.Mkfifo(pipe, 0o600), os.Symlink(path, link)); err != nil {
		t.Fatal(err)
	}
	for _, wrong := range []string{pipe, link, dir, filepath.Join(dir, "none", "log"), "/dev/null"} {
		f, err := Open(nil, wrong)
		if err == nil {
			_ = f.Close()
			t.Errorf("%s was opened", wrong)
			continue
		}
		if !strings.HasPrefix(err.Error(), "audit_log: expected a file that can be written: ") || !strings.Contains(err.Error(), wrong) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%v", err)
		}
	}
}
