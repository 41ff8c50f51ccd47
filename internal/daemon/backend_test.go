package daemon

import (
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

// A large map is not listed; what is missing is found all the same.
func TestMissingIsFoundWithoutAList(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	tables, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	defer tables.Close()
	c := &rules.MapConfig{Size: 100, Lifetime: time.Minute, Subnets: []netip.Prefix{lab.InsideNet}}
	if _, err := tables.Set(rules.Desired{OutsideLinks: []string{"wan0"}, Map: c}); err != nil {
		t.Fatal(err)
	}
	b := newBackends()
	b.nft = tables.NewMap(c)
	var ps []cone.Permission
	var ops []cone.Op
	for port := range uint16(3) {
		ps = append(ps, cone.Permission{
			Key: cone.Key{Ext: cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 1+port)), Peer: cone.AddrFrom(lab.PeerA)},
			Int: cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:1")),
		})
	}
	for _, p := range ps {
		ops = append(ops, cone.Op{Permission: p, By: cone.ByMap})
	}
	b.Grant(ops, func(i int, _ cone.Carriers, r cone.Reason, err error) { t.Fatal(ps[i], r, err) })
	if err := b.nft.Revoke(ps[1:2]); err != nil {
		t.Fatal(err)
	}
	for name, ofMap := range map[string]bool{"listed": true, "not listed": false} {
		f, err := b.list(ofMap)
		if err != nil || (f.nft != nil) != ofMap {
			t.Fatalf("%s: %v, %v", name, f, err)
		}
		var lost []cone.Permission
		b.missing(ops, f, func(p cone.Permission, _ cone.Carriers) { lost = append(lost, p) })
		if len(lost) != 1 || lost[0] != ps[1] {
			t.Errorf("%s: %v are missing, want %v", name, lost, ps[1])
		}
	}
}
