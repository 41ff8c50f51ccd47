package logs

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
)

// file returns a file to log to, and a function that returns what is in it.
func file(t *testing.T) (*os.File, func() string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "log")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f, func() string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
}

// connect sets JOURNAL_STREAM to the stream of f, plus a difference in the inode.
func connect(t *testing.T, f *os.File, difference uint64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	t.Setenv("JOURNAL_STREAM", fmt.Sprintf("%d:%d", st.Dev, st.Ino+difference))
}

// Fails when a priority is wrong, a field is lost, or a value can begin a line.
func TestTheJournalGetsPrioritiesAndFields(t *testing.T) {
	f, read := file(t)
	connect(t, f, 0)
	var level slog.LevelVar
	level.Set(slog.LevelDebug)
	log := slog.New(New(f, config.AutoLog, &level)).With("int", "10.0.0.1:5060")
	log.Debug("granted", "peer", "203.0.113.5")
	log.Info("runs")
	log.Warn("late", "err", "a\n<3>b")
	level.Set(slog.LevelError)
	log.Warn("not logged")
	log.WithGroup("g").Error("ends", "level", "x")
	want := `<7>msg=granted int=10.0.0.1:5060 peer=203.0.113.5
<6>msg=runs int=10.0.0.1:5060
<4>msg=late int=10.0.0.1:5060 err="a\n<3>b"
<3>msg=ends int=10.0.0.1:5060 g.level=x
`
	if got := read(); got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// Fails when the stream of another process counts as the journal, when a file gets text,
// and when a duration is in nanoseconds.
func TestWhatIsNoTerminalAndNoJournalGetsJSON(t *testing.T) {
	f, read := file(t)
	connect(t, f, 1)
	slog.New(New(f, config.AutoLog, slog.LevelInfo)).Info("runs", "count", 1, "lifetime", 1500*time.Millisecond)
	if got := read(); !strings.HasPrefix(got, "{") || !strings.Contains(got, `"msg":"runs","count":1,"lifetime":1.5}`) {
		t.Errorf("got %s", got)
	}
}

func TestATerminalGetsText(t *testing.T) {
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("no terminal: %v", err)
	}
	defer master.Close()
	if got := resolve(master, config.AutoLog); got != config.TextLog {
		t.Errorf("got %s", got)
	}
}

func TestAFormatThatWasAskedForIsUsed(t *testing.T) {
	for format, want := range map[config.LogFormat]string{
		config.TextLog: "time=", config.JSONLog: "{", config.JournalLog: "<6>",
	} {
		f, read := file(t)
		connect(t, f, 0)
		slog.New(New(f, format, slog.LevelInfo)).Info("runs")
		if got := read(); !strings.HasPrefix(got, want) {
			t.Errorf("%s: got %s", format, got)
		}
	}
}
