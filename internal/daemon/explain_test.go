package daemon

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Fails when an explanation hides that the daemon may not know of a permission yet.
func TestExplanationSaysWhatLeanEventsHide(t *testing.T) {
	c := packetCase{
		peer: netip.MustParseAddrPort("203.0.113.5:0"), ext: netip.MustParseAddrPort("198.51.100.1:5060"),
		owned: true, local: func(netip.Addr) bool { return false },
	}
	last := func() string {
		x := c.explain()
		return x.Steps[len(x.Steps)-1].Text
	}
	if got := last(); strings.Contains(got, "lean") {
		t.Errorf("while all events are told: %q", got)
	}
	c.unseen = 3 * time.Second
	if got := last(); !strings.Contains(got, "a flow of the last 3s may have given one") {
		t.Errorf("while events are lean: %q", got)
	}
}
