//go:build !conenatd_small

package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/metrics"
	"github.com/conenatd/conenatd/internal/page"
)

// A site answers Prometheus and browsers at metrics_listen. Without a listener it does
// nothing.
type site struct {
	net.Listener
	page config.Page
}

// openSite listens on metrics_listen, if there is one.
func openSite(cfg *config.Config, log *slog.Logger) (s site, err error) {
	s.page = cfg.Page
	if !cfg.MetricsListen.IsValid() {
		return s, nil
	}
	ln, absent, err := metrics.Listen(cfg.MetricsListen)
	if err != nil {
		return s, err
	}
	if absent {
		log.Warn("metrics_listen: no link has the address; scrapes are answered once one has it", "address", cfg.MetricsListen)
	}
	s.Listener = ln
	return s, nil
}

// serve answers until ctx ends, and closes the listener then. If the listener fails, it says so
// and returns no error: the daemon goes on without.
func (s site) serve(ctx context.Context, d *shared) error {
	if s.Listener == nil {
		return nil
	}
	var people http.Handler
	if s.page != config.PageOff {
		people = page.Handler(source{d}, s.page == config.PageEverywhere)
	}
	if err := control.ServeHTTP(ctx, s, metrics.Site(source{d}.Status, people), d.log); err != nil {
		d.log.Error("metrics are no longer served at metrics_listen; restart conenatd to serve them again", "err", err)
	}
	return nil
}

// close closes the listener, unless serve has closed it.
func (s site) close() error {
	if s.Listener == nil {
		return nil
	}
	if err := s.Close(); !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// Metrics answers with the metrics of Status (control.Source).
func (s source) Metrics() http.Handler { return metrics.Handler(s.Status) }
