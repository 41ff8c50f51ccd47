//go:build conenatd_small

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net/http"

	"github.com/conenatd/conenatd/internal/config"
)

// errSmall says that metrics_listen is of no use in this build.
var errSmall = &config.UsageError{Err: errors.New(
	"metrics_listen: this is the small build, which has neither metrics nor the page: take metrics_listen out, or install the full build",
)}

// A site is nothing in the small build.
type site struct{}

func openSite(cfg *config.Config, _ *slog.Logger) (s site, err error) {
	if cfg.MetricsListen.IsValid() {
		return s, errSmall
	}
	return s, nil
}

func (site) serve(context.Context, *shared) error { return nil }

func (site) close() error { return nil }

// Metrics returns nil (control.Source).
func (source) Metrics() http.Handler { return nil }
