// Package logs writes the log of the daemon in the form that suits its reader: a person at a
// terminal, systemd's journal, or a program.
package logs

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
)

// New returns a handler that logs to f from a level on. AutoLog means text on a terminal,
// JournalLog where f is connected to the journal, and JSON otherwise.
func New(f *os.File, format config.LogFormat, level slog.Leveler) slog.Handler {
	options := &slog.HandlerOptions{Level: level}
	switch resolve(f, format) {
	case config.JournalLog:
		return newJournal(f, level)
	case config.JSONLog:
		options.ReplaceAttr = inSeconds
		return slog.NewJSONHandler(f, options)
	}
	return slog.NewTextHandler(f, options)
}

// inSeconds makes a duration a number of seconds; slog would write nanoseconds.
func inSeconds(_ []string, a slog.Attr) slog.Attr {
	if a.Value.Kind() == slog.KindDuration {
		return slog.Float64(a.Key, a.Value.Duration().Seconds())
	}
	return a
}

// resolve returns the format for f.
func resolve(f *os.File, format config.LogFormat) config.LogFormat {
	switch {
	case format != config.AutoLog:
		return format
	case ToJournal(f):
		return config.JournalLog
	}
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
		return config.TextLog
	}
	return config.JSONLog
}

// ToJournal reports whether f is the stream that systemd connected to its journal: the
// device and the inode of f are those of JOURNAL_STREAM (systemd.exec(5)).
func ToJournal(f *os.File) bool {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// Priority returns the prefix that gives a line of the journal its priority
// (sd-daemon(3), SyslogLevelPrefix of systemd.exec(5)).
func Priority(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "<3>"
	case level >= slog.LevelWarn:
		return "<4>"
	case level >= slog.LevelInfo:
		return "<6>"
	}
	return "<7>"
}

// A journal is a handler for the journal. It writes text without time and level, which the
// journal has itself, behind a priority. It has a text handler for each priority.
type journal struct{ byPriority map[string]slog.Handler }

func newJournal(w io.Writer, level slog.Leveler) journal {
	j := journal{make(map[string]slog.Handler)}
	for _, l := range []slog.Level{slog.LevelDebug, slog.LevelInfo, slog.LevelWarn, slog.LevelError} {
		j.byPriority[Priority(l)] = slog.NewTextHandler(prefixed{w, Priority(l)}, &slog.HandlerOptions{Level: level, ReplaceAttr: withoutTime})
	}
	return j
}

// withoutTime drops the time and the level of a record.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
		return slog.Attr{}
	}
	return a
}

// prefixed puts a prefix in front of each write, which is one line of a text handler.
type prefixed struct {
	w      io.Writer
	prefix string
}

func (p prefixed) Write(b []byte) (int, error) {
	n, err := p.w.Write(append([]byte(p.prefix), b...))
	return max(n-len(p.prefix), 0), err
}

func (j journal) Enabled(ctx context.Context, level slog.Level) bool {
	return j.byPriority[Priority(level)].Enabled(ctx, level)
}

func (j journal) Handle(ctx context.Context, r slog.Record) error {
	return j.byPriority[Priority(r.Level)].Handle(ctx, r)
}

func (j journal) WithAttrs(attrs []slog.Attr) slog.Handler {
	return j.each(func(h slog.Handler) slog.Handler { return h.WithAttrs(attrs) })
}

func (j journal) WithGroup(name string) slog.Handler {
	return j.each(func(h slog.Handler) slog.Handler { return h.WithGroup(name) })
}

func (j journal) each(f func(slog.Handler) slog.Handler) journal {
	next := journal{make(map[string]slog.Handler)}
	for priority, h := range j.byPriority {
		next.byPriority[priority] = f(h)
	}
	return next
}
