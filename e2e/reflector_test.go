package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// reflector is a rule set for the outside namespace. Its rule sends each packet
// back: every statement overwrites only what later ones need not read.
//
// nft has no registers for swapping the addresses, so the new source is a constant.
// The kernel updates the checksums with each write, also where a host left them to
// the link (CHECKSUM_PARTIAL). The link-layer source stays the gateway's own;
// gateways do not check it.
const reflector = `add table netdev reflector
add chain netdev reflector port%[1]d { type filter hook ingress device "eth0" priority 0; }
flush chain netdev reflector port%[1]d
add rule netdev reflector port%[1]d \
	ip saddr %[3]s udp dport %[1]d \
	ip saddr set ip daddr ip daddr set %[3]s \
	udp dport set udp sport udp sport set %[2]d \
	ether daddr set ether saddr \
	fwd to "eth0"
`

// reflect makes all peers answer packets to port from answerPort, with the same
// payload. The answer is made in the softirq that delivers the packet, usually
// before the asker's Send returns. A socket on port gets nothing any more. Only
// packets from the gateway's own IPv4 address are reflected, as masquerade sends
// them. A second call for a port replaces the first.
//
// The answer leaves on the CPU that received the packet, so the argument of [lab.Lost]
// holds for reflected packets.
func (s *scene) reflect(port, answerPort uint16) {
	s.T.Helper()
	cmd := s.Outside.Command(s.T.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf(reflector, port, answerPort, s.Gateway.Addr))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.T.Fatalf("reflect port %d: %v: %s", port, err, out)
	}
}

func TestReflectorAnswersFromThePortAsked(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.reflect(7000, 7000)
	for i := range 200 {
		// The sockets stay open, so that each has a port of its own.
		in := s.InsideSocket(0, 0)
		asked := netip.AddrPortFrom([]netip.Addr{lab.PeerA, lab.PeerC}[i%2], 7000)
		p := stage.Payload("question") + strings.Repeat("x", 7*i) // odd lengths, and up to a full frame
		s.Must(in.Send(asked, p))
		got, err := in.Expect(p)
		if err != nil {
			t.Fatalf("answer %d from %v: %v\n%s", i, asked, err, s.Dump())
		}
		if got != asked {
			t.Fatalf("the answer from %v seems to come from %v", asked, got)
		}
	}
}

func TestReflectorAnswersFromAnotherPort(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.reflect(7000, 7001)
	s.reflect(7002, 7002)
	asked, fence := netip.AddrPortFrom(lab.PeerA, 7000), netip.AddrPortFrom(lab.PeerA, 7002)

	// A host that has contacted the other port gets the answer from there.
	other, known := s.PeerSocket(lab.PeerA, 7001), s.InsideSocket(0, 0)
	s.Contact(known, other)
	for range 10 {
		p := stage.Payload("question")
		s.Must(known.Send(asked, p))
		got, err := known.Expect(p)
		if err != nil {
			t.Fatalf("%v\n%s", err, s.Dump())
		}
		if got != other.Addr() {
			t.Fatalf("the answer comes from %v, want %v", got, other.Addr())
		}
	}

	// To all others the NAT is closed.
	for range 10 {
		in := s.InsideSocket(0, 0)
		s.Must(lab.Lost(in,
			lab.Packet{From: in, To: asked, Payload: stage.Payload("must not come back")},
			lab.Packet{From: in, To: fence, Payload: stage.Payload("fence")}))
	}
}

func TestReflectorCanBeChanged(t *testing.T) {
	s := newScene(t, lab.Options{})
	in, asked := s.InsideSocket(0, 0), netip.AddrPortFrom(lab.PeerA, 7000)
	s.reflect(7000, 7001)
	s.reflect(7000, 7000)
	p := stage.Payload("question")
	s.Must(in.Send(asked, p))
	if got, err := in.Expect(p); err != nil || got != asked {
		t.Fatalf("answer from %v, want %v: %v\n%s", got, asked, err, s.Dump())
	}
}
