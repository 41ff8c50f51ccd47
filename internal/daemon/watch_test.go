package daemon

import (
	"bytes"
	"log/slog"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

func grantedTo(i int) cone.Event {
	return cone.Event{Kind: cone.EventGranted, Permission: cone.Permission{
		Key: cone.Key{Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(i))), Zone: uint16(i >> 16)},
	}}
}

// Fails when a permission that comes or goes is not logged at debug, or is above.
func TestGrantsAreLoggedAtDebug(t *testing.T) {
	var log bytes.Buffer
	s := &shared{log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
	s.observe(grantedTo(5060))
	s.observe(cone.Event{Kind: cone.EventRevoked, Permission: grantedTo(5060).Permission, Reason: cone.ReasonStopped})
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "level=DEBUG msg=granted ") || !strings.Contains(lines[0], "ext=198.51.100.1:5060") ||
		!strings.Contains(lines[1], "level=DEBUG msg=revoked ") || !strings.Contains(lines[1], "reason="+cone.ReasonStopped.String()) {
		t.Errorf("logged %q", lines)
	}
}
