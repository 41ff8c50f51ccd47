package expect

import (
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

func TestAnchorIsFoundAgainByItsPorts(t *testing.T) {
	for _, p := range []cone.Permission{seed, routed, zoned} {
		for _, flipped := range []bool{false, true} {
			a := anchorOf(&p, flipped)
			src, dst := a.endpoints()
			if got := anchorAt(src, dst, p.Zone); got != a || !cone.IsAnchor(src, dst) {
				t.Errorf("%+v from %v to %v", got, src, dst)
			}
		}
	}
}

// A dump may show an entry twice, or an anchor that serves another outside
// address than we thought.
func TestLedgerCountsAnAnchorOnce(t *testing.T) {
	l := newLedger(10)
	a := anchorOf(&seed, false)
	other := seed
	other.Ext.Addr[15]++
	for _, p := range []*cone.Permission{&seed, &seed, &other} {
		l.take(a, p)
		if len(l.ext) != 1 || len(l.onPort) != 1 || l.onPort[port{cone.Endpoint{Addr: p.Ext.Addr, Port: a.port}, 0}] != 1 {
			t.Errorf("%+v", l)
		}
	}
	if _, stands, _ := l.of(&other); !stands {
		t.Error("not found again")
	}
	l.release(a)
	l.release(a)
	if len(l.ext)+len(l.onPort) != 0 {
		t.Errorf("left: %+v", l)
	}
}
