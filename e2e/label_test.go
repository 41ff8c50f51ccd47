package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A rule of the user's labels all flows as conenatd labels the children of its map. The daemon
// says so, and deletes no flow of the user's forward.
//
// Fails when a flow of a forward counts as a child that has lost its permission.
func TestLabelThatTheUserSets(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 2, Rules: lab.Masquerade + `table ip user {
		chain forward { type filter hook forward priority 0; ct label set 126; }
		chain forwards { type nat hook prerouting priority dstnat; iifname "wan0" udp dport 6000 dnat to 10.47.11.110; }; }`})
	host, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 6000)
	ext := s.Contact(host, s.PeerSocket(lab.PeerA, 5060))
	s.Must(s.PeerSocket(lab.PeerA, 9000).Send(netip.AddrPortFrom(ext.Addr(), 6000), "unanswered"))
	_, err := server.Expect("unanswered")
	s.Must(err)
	entry := func() string {
		lines := s.ConntrackList("-p", "udp", "--orig-port-dst", "6000", "-o", "id")
		if len(lines) != 1 {
			t.Fatalf("flows of the forward are %q, want one", lines)
		}
		return lines[0][strings.Index(lines[0], "id="):]
	}
	before := entry()
	s.Start(stage.Flags(stage.Auto)...)
	s.Until("the daemon tells of the label", func() bool {
		return slices.ContainsFunc(s.Status().Findings, func(f control.Finding) bool { return f.ID == "label_taken" })
	})
	if after := entry(); after != before {
		t.Errorf("the flow was %s, and is %s now", before, after)
	}
}
