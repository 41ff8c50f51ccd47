package e2e

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A status request during a reconcile that reads many flows is answered between two pieces
// of the dump, and the reconcile goes on undisturbed.
//
// Fails when status uses the connection that the reconcile reads from.
func TestStatusDoesNotDisturbAReconcile(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	s.Must(s.Gateway.Do(func() error {
		c, err := conntrack.Dial(nil)
		if err != nil {
			return err
		}
		from, to := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for port := range uint16(8000) { // a piece has 1,024
			f := conntrack.NewFlow(unix.IPPROTO_UDP, conntrack.StatusConfirmed|conntrack.StatusAssured, from, to, 1024+port, 9, 600, 0)
			err = errors.Join(err, c.Create(f))
		}
		return errors.Join(err, c.Close())
	}))
	s.Start(stage.Flags(stage.Expect, "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	for i := range uint64(3) { // which only a reconcile sees
		_, err := s.Gateway.Output("conntrack", "-F", "expect")
		s.Must(err)
		s.Until("a reconcile put it back", func() bool { return s.Status().Counters.Repaired["expectations"] > i })
	}
	if st := s.Status(); len(st.Counters.Failed) > 0 || st.Flows != 1 {
		t.Errorf("failed %v, %d flows", st.Counters.Failed, st.Flows)
	}
	s.Stands(phone, proxy, ext)
}
