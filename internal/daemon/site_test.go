//go:build !conenatd_small

package daemon

import (
	"bytes"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
)

// A brokenListener fails to accept.
type brokenListener struct{ net.Listener }

func (brokenListener) Accept() (net.Conn, error) { return nil, errors.New("accept is broken") }

// Fails when a listener of metrics that fails ends the daemon, or fails without a word.
func TestMetricsThatFailDoNotEndTheDaemon(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	d := &shared{log: slog.New(slog.NewTextHandler(&b, nil)), ended: make(chan struct{})}
	s := site{Listener: brokenListener{ln}}
	if err := s.serve(t.Context(), d); err != nil {
		t.Errorf("the daemon ends by %v", err)
	}
	if !strings.Contains(b.String(), "accept is broken") {
		t.Errorf("the log says %q", b.String())
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
}
