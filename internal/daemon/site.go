package daemon

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/metrics"
)

// A site answers Prometheus at metrics_listen. Without a listener it does nothing.
type site struct{ net.Listener }

// openSite listens on the address, if there is one.
func openSite(addr netip.AddrPort) (s site, err error) {
	if addr.IsValid() {
		s.Listener, err = metrics.Listen(addr)
	}
	return s, err
}

// serve answers until ctx ends, and closes the listener then.
func (s site) serve(ctx context.Context, d *shared) error {
	if s.Listener == nil {
		return nil
	}
	return control.ServeHTTP(ctx, s, metrics.Site(source{d}.Status), d.log)
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
