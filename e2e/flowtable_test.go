package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// offload are the usual rules that offload answered UDP flows to a flowtable, and a
// counter of the packets that still pass the rules. %s is the list of links.
const offload = `table inet fast {
	flowtable ft {
		hook ingress priority 0
		devices = { %s }
	}
	counter passed { }
	chain forward {
		type filter hook forward priority filter; policy accept;
		meta l4proto udp counter name passed
		ct state established meta l4proto udp flow add @ft
	}
}
`

// newOffloadScene makes a lab without a daemon whose gateway masquerades and
// offloads. It skips the test on a kernel without flowtables, but fails it on
// Debian's kernels in QEMU, which have them.
func newOffloadScene(t *testing.T, o lab.Options) *scene {
	t.Helper()
	s := newScene(t, o)
	err := s.NFT(fmt.Sprintf(offload, offloadLinks(o)))
	// If nft itself rejects the rules, the test is wrong, on any kernel.
	refused := err != nil && strings.Contains(err.Error(), "Could not process rule")
	if refused && os.Getenv("CONENATD_GUEST") == "" {
		t.Skipf(`this kernel has no flowtables (%v): run "make kernels"`, err)
	}
	s.Must(err)
	return s
}

// offloadLinks lists the links for which flows are offloaded. For a bridge, old kernels
// (5.10) need the bridge itself, and new ones (7.3) its ports.
func offloadLinks(o lab.Options) string {
	links := []string{"wan0", "lan0"}
	for i := range max(o.Inside, 1) {
		links = append(links, fmt.Sprintf("lan0p%d", i))
	}
	if o.Guest {
		links = append(links, "guest0")
	}
	return strings.Join(links, ", ")
}

// offloaded returns the UDP flows that the kernel has taken out of the packet
// path, as "conntrack -L" lists them.
func offloaded(s *scene) (flows []string) {
	s.T.Helper()
	for _, line := range s.ConntrackList("-p", "udp") {
		if strings.Contains(line, "[OFFLOAD]") {
			flows = append(flows, line)
		}
	}
	return flows
}

// passed shows the counter of UDP packets that the rules of the gateway see.
func (s *scene) passed() string {
	s.T.Helper()
	out, err := s.Gateway.Output("nft", "list", "counter", "inet", "fast", "passed")
	s.Must(err)
	return out
}

// The same on a bridge and on a plain link.
func TestFlowIsOffloadedOnceItIsAnswered(t *testing.T) {
	s := newOffloadScene(t, lab.Options{Inside: 2, Guest: true})
	for name, h := range map[string]*lab.Host{"inside": s.Inside(1), "guest": s.Guest} {
		t.Run(name, func(t *testing.T) {
			s := &scene{&stage.Scene{Lab: s.Lab, T: t}}
			in, peer := s.Socket(h.Namespace, h.Addr, 0), s.PeerSocket(lab.PeerA, 0)
			mine := func() int {
				t.Helper()
				return strings.Count(strings.Join(offloaded(s), "\n"), "src="+h.Addr.String()+" ")
			}
			ext := s.Contact(in, peer)
			if mine() != 0 {
				t.Fatalf("offloaded without an answer\n%s", s.Dump())
			}
			talk := func() {
				t.Helper()
				for range 5 {
					s.Arrives(in, peer, ext)
					if got := s.Contact(in, peer); got != ext {
						t.Fatalf("the outside endpoint is %v, was %v", got, ext)
					}
				}
			}
			talk()
			if mine() != 1 {
				t.Fatalf("not offloaded though answered\n%s", s.Dump())
			}
			// The mark alone does not show that the fast path takes the packets.
			before := s.passed()
			talk()
			if after := s.passed(); after != before {
				t.Errorf("packets of an offloaded flow pass the rules: before %s\nafter %s", before, after)
			}
		})
	}
}

// Fails when doctor does not name the flowtable.
func TestFlowtableIsNamedByDoctor(t *testing.T) {
	s := newOffloadScene(t, lab.Options{})
	if out, _ := s.CLI("doctor", "--subnet", lab.InsideNet.String()); !strings.Contains(out, "there are flowtables: inet fast ft") {
		t.Error(out)
	}
}
