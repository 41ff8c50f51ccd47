package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Hosts behind a router of the LAN leave translated, and "auto" does not serve them: status says so until
// their network is named.
//
// Fails when status only says that it works.
func TestNetworkThatAutoLeavesOutIsTold(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	const text = `leaves out 10.99.0.0/16 on lan0, to which a route leads`
	s.Start("--subnet", "auto", "--reconcile=1s")
	s.IP(s.Gateway, "route add 10.99.0.0/16 via 10.47.11.109")
	s.told(text)
	if out, _ := s.CLI("status"); !strings.HasPrefix(out, "works\n") {
		t.Error(out)
	}
	s.IP(s.Gateway, "route del 10.99.0.0/16")
	s.over(text)
	s.Stop()
	s.IP(s.Gateway, "route add 10.99.0.0/16 via 10.47.11.109")
	s.Start("--subnet", "auto", "--subnet", "10.99.0.0/16")
	if w := s.Status().Warnings; len(w) > 0 {
		t.Errorf("warnings %q", w)
	}
}
