package chaos

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// verify reports what is wrong and repairs nothing. If it saw nothing, the other tests
// of this package would prove less.
//
// Fails when a permission that is missing in the kernel, or a flow that differs from
// conntrack, is not reported.
func TestVerifyTellsWhatIsWrong(t *testing.T) {
	s := stage.New(t, lab.Options{})
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Until("the child is listed", func() bool { return s.List()[0].Children == 1 })
	s.Verified()
	for _, tc := range []struct{ hand, want string }{
		{"-F expect", "203.0.113.5/32 -> 198.51.100.1:5060 stands, but not in the kernel"},
		{"-D -p udp --orig-src 203.0.113.5", "; 1 wrong"}, // an event reports the end of the child
	} {
		_, err := s.Gateway.Output("conntrack", strings.Fields(tc.hand)...)
		s.Must(err)
		for range 2 { // a report does not repair it
			out, code := s.CLI("status", "--verify", "--control-socket", s.Daemon.Socket)
			if code != 1 || !strings.Contains(out, tc.want) {
				t.Errorf("%s: exit %d, %s", tc.hand, code, out)
			}
		}
	}
}
