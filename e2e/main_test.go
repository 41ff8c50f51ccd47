// Package e2e tests conenatd with real packets.
package e2e

import (
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestMain(m *testing.M) { stage.Main(m) }

type scene struct{ *stage.Scene }

// newScene makes a lab without a daemon.
func newScene(t *testing.T, o lab.Options) *scene {
	t.Helper()
	return &scene{stage.New(t, o)}
}

// play makes a lab with a daemon that serves the inside network.
func play(t *testing.T, o lab.Options, args ...string) *scene {
	t.Helper()
	s := newScene(t, o)
	s.Serve(args...)
	return s
}
