// Package episodestest has a log that tests can read.
package episodestest

import (
	"log/slog"
	"strings"
)

// Logged returns a logger and what it wrote since the last call.
func Logged() (log *slog.Logger, lines func() string) {
	var out strings.Builder
	log = slog.New(slog.NewTextHandler(&out, &slog.HandlerOptions{
		ReplaceAttr: func(_ []string, a slog.Attr) slog.Attr {
			if a.Key == slog.TimeKey {
				return slog.Attr{}
			}
			return a
		},
	}))
	return log, func() string {
		defer out.Reset()
		return out.String()
	}
}
