package handover

import (
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when the note loses something, or counts for another network namespace, for more
// than two hours, or when it is broken.
func TestNoteTellsWhatIsRevoked(t *testing.T) {
	n := Notes{Path: filepath.Join(t.TempDir(), "run", "c."), cookie: 7}
	want := []cone.Revoked{
		{Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060")), Peer: cone.EndpointFrom(netip.MustParseAddrPort("203.0.113.5:0")).Addr, Zone: 3}, Flows: []uint32{1, 1<<32 - 1}},
		{Key: cone.Key{Ext: cone.EndpointFrom(netip.MustParseAddrPort("[2001:db8::1]:1")), Peer: cone.EndpointFrom(netip.MustParseAddrPort("[2001:db8:1::]:0")).Addr, HostBits: 64}},
	}
	expect := func(what string, n Notes, want []cone.Revoked) {
		t.Helper()
		if got, err := n.Revoked(); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %v, %v, want %v", what, got, err, want)
		}
	}
	expect("without a note", n, nil)
	for range 2 {
		if err := n.WriteRevoked(want); err != nil {
			t.Fatal(err)
		}
		expect("the note", n, want)
	}
	expect("in another namespace", Notes{Path: n.Path, cookie: 8}, nil)
	old := time.Now().Add(-noteLasts - time.Second)
	if err := os.Chtimes(n.file(revokedNote), old, old); err != nil {
		t.Fatal(err)
	}
	expect("after two hours", n, nil)
	if err := os.WriteFile(n.file(revokedNote), []byte("[{ 7\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := n.Revoked(); err == nil || got != nil {
		t.Errorf("a broken note says %v, %v", got, err)
	}
	if err := n.WriteRevoked(nil); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(n.file(revokedNote)); !os.IsNotExist(err) {
		t.Errorf("nothing is revoked, and the note is there: %v", err)
	}
}
