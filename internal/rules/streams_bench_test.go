package rules_test

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// BenchmarkPacketOfAStream measures a later packet that an inside host sends in one of its
// flows: in one that nobody answers (media that is pushed, NetFlow, syslog), and in an
// answered one. The baseline is a gateway without conenatd.
func BenchmarkPacketOfAStream(b *testing.B) {
	auto := standard
	auto.Helpers, auto.MaxChildren = onAnchors, 256
	for _, answered := range []bool{false, true} {
		title := map[bool]string{false: "one way", true: "answered"}[answered]
		b.Run(title, func(b *testing.B) {
			onOneCPU(b)
			newArm := func(name string, d *rules.Desired) *arm {
				a := newArmOf(b, name, newFlood(b, lab.ForTest(b, lab.Options{}), packets, true), false)
				if d != nil {
					a.carry(b, *d)
				}
				from, to := benchInt, netip.AddrPortFrom(lab.PeerA, 5060)
				in, err := a.Inside(0).Socket(from.Addr(), from.Port())
				must(b, err)
				peer, err := a.Outside.Socket(to.Addr(), to.Port())
				must(b, err)
				b.Cleanup(func() { must(b, in.Close()); must(b, peer.Close()) })
				for i := range packets {
					a.Aim(i, from, to)
				}
				a.begin = func(int) {
					must(b, in.Send(to, "x"))
					if answered {
						must(b, peer.Send(benchExt, "answer"))
					}
					a.came(b)
				}
				return a
			}
			arms := []*arm{newArm("stock", nil), newArm("stock again, for the noise", nil), newArm("nft", &standard), newArm("auto", &auto)}
			for b.Loop() {
				report(b, "packet of a stream, "+title, arms, race(b, arms, 20, flowParts))
			}
			b.ReportMetric(spreadOf(arms[2].ratios(arms[0])).median, "nft/stock")
			b.ReportMetric(spreadOf(arms[3].ratios(arms[0])).median, "auto/stock")
		})
	}
}
