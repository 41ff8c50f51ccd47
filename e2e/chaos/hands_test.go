package chaos

import (
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Others delete conntrack entries or expectations. The daemon restores them at once if an
// event reports it, otherwise after one reconcile, and counts it. Changes to the tables are
// in e2e/mend_test.go.
//
// Fails when events of anchors are dropped (the reconcile is then an hour away), and when
// compare does not look for missing entries.
func TestHandsOnConntrack(t *testing.T) {
	const never, soon = "--reconcile=1h", "--reconcile=1s"
	for _, tc := range []struct{ hand, reconcile string }{
		{"-F", never},
		{"-D -p udp --orig-src 10.47.11.109", never}, // anchors included
		{"-F expect", soon},                          // no event reports this
	} {
		t.Run(strings.ReplaceAll(tc.hand, " ", "_"), func(t *testing.T) {
			stage.InModes(t, modes, func(t *testing.T, mode ...string) {
				s := stage.New(t, lab.Options{})
				s.Start(stage.Flags(mode, tc.reconcile)...)
				phone := s.InsideSocket(0, 5060)
				a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
				ext := s.Contact(phone, a)
				s.Contact(phone, b)
				s.Stands(phone, a, ext)
				s.Stands(phone, b, ext)
				before := held(s)
				began := time.Now()
				_, err := s.Gateway.Output("conntrack", strings.Fields(tc.hand)...)
				s.Must(err)
				s.Until("the kernel holds what it held", func() bool { return held(s) == before })
				t.Logf("mended after %v", time.Since(began).Round(time.Millisecond))
				for i, peer := range []*lab.Socket{a, b} {
					s.Arrives(phone, s.PeerSocket(peer.Addr().Addr(), uint16(7000+i)), ext)
				}
				// Conntrack holds nothing for a permission that stands in the map alone.
				n, want := s.Status().Counters.Repaired, before.expectations
				if int(n["expectations"]) < want || tc.reconcile == never && int(n["anchors"]) < want {
					t.Errorf("counted %v, want %d", n, want)
				}
				if ps := s.List(); len(ps) != 2 {
					t.Errorf("%+v", ps)
				}
				s.Verified()
			})
		})
	}
}

// Without events each reconcile grants permissions, and the user is warned.
//
// Fails when the reconcile does not give the flows to the model.
func TestHandsSwitchEventsOff(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		s := stage.New(t, lab.Options{})
		s.Start(stage.Flags(mode, "--reconcile=1s")...)
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		if !stage.Warned(s.Status(), "no conntrack events") {
			t.Errorf("no warning: %q", s.Status().Warnings)
		}
	})
}
