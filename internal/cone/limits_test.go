package cone

import (
	"fmt"
	"testing"
	"time"
)

// limit is one of which three permissions make room at once.
const limit = 3 * evictedPart

// limitsOf returns each limit on permissions alone.
func limitsOf(n int) map[string]Limits {
	return map[string]Limits{"host": {PerHost: n}, "subnet": {PerSubnet: n}, "all": {Total: n}}
}

// fill lets one host open n flows from the ports 1000 and up. open opens another one, from a port.
func (d *desk) fill(n int) (open func(port int) *Flow, flows []*Flow) {
	open = func(port int) *Flow { return d.open(0, fmt.Sprintf("10.47.11.109:%d", port), "203.0.113.5:9") }
	for i := range n {
		flows = append(flows, open(1000+i))
	}
	return open, flows
}

// Where idle permissions make room, a part of the limit ends at once, the oldest first, so that not
// each new flow ends one.
//
// Fails when one of them has a living flow, and when more or fewer end.
func TestRoomIsMadeForSeveral(t *testing.T) {
	for name, l := range limitsOf(limit) {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { p.Limits = l })
			open, flows := d.fill(limit)
			for _, f := range []*Flow{flows[1], flows[2], flows[4], flows[0], flows[7]} {
				d.gone(0, f)
			}
			open(2000)
			if n := d.m.Stats().Standing; n != limit-3+1 {
				t.Errorf("%d stand, want %d", n, limit-3+1)
			}
			for i, stands := range map[int]bool{1: false, 2: false, 4: false, 0: true, 7: true, 3: true} {
				if _, up := d.up[Key{Ext: flows[i].ReplyDst, Peer: flows[i].ReplySrc.Addr}]; up != stands {
					t.Errorf("permission %d stands: %v", i, up)
				}
			}
			open(2001)
			open(2002)
			if n := d.m.Stats().Standing; n != limit {
				t.Errorf("%d stand, want %d: there was room", n, limit)
			}
		})
	}
}

// A host at its limit whose flows end one after the other: each of them alone makes no room.
//
// Fails when an idle permission ends although fewer are idle than should end at once.
func TestRoomIsMadeOnceSeveralAreIdle(t *testing.T) {
	for name, l := range limitsOf(limit) {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, func(p *Policy) { p.Limits = l })
			open, flows := d.fill(limit)
			for i, want := range []int{limit, limit, limit - 3 + 1} { // that stand
				d.gone(0, flows[i])
				open(2000 + i)
				if n := d.m.Stats().Standing; n != want {
					t.Errorf("%d idle: %d stand, want %d", i+1, n, want)
				}
			}
			if n := d.m.Stats().Refused; n != 2 {
				t.Errorf("%d are refused, want 2", n)
			}
			for now := time.Duration(0); d.m.Tick(now, 100) || now < testPolicy.Retry*2; now += time.Second {
				d.carry() // refused ones are tried again
			}
			if n := d.m.Stats().Standing; n != limit {
				t.Errorf("%d stand, want %d", n, limit)
			}
		})
	}
}

// A limit is lowered under what stands. A new permission stands once enough of the others are idle,
// and all that are beyond the limit end for it at once, also if it is nowhere near a 64th of it.
//
// Fails when only as many end as at a limit that did not change, or when some end and the new one
// is refused all the same.
func TestRoomIsMadeBeyondALoweredLimit(t *testing.T) {
	const stood, lowered = 19, 4
	for name, l := range limitsOf(lowered) {
		for _, tc := range []struct {
			idle, want int
			stands     [2]bool // the new ones
		}{
			{stood, lowered, [2]bool{true, true}},
			{stood - lowered + 1, lowered, [2]bool{true, false}},
			{stood - lowered, stood, [2]bool{false, false}},
		} {
			t.Run(fmt.Sprintf("%s, %d idle", name, tc.idle), func(t *testing.T) {
				d := newDesk(t, nil)
				open, flows := d.fill(stood)
				p := testPolicy
				p.Limits = l
				d.m.SetPolicy(0, p)
				for _, f := range flows[stood-tc.idle:] {
					d.gone(0, f)
				}
				for i, stands := range tc.stands {
					open(2000 + i)
					if v := d.view(fmt.Sprintf("10.47.11.109:%d", 2000+i)); (v.State == StateStanding) != stands {
						t.Errorf("new one %d is %v, for %v", i, v.State, v.Reason)
					}
					if n := d.m.Stats().Standing; n != tc.want {
						t.Errorf("%d stand, want %d", n, tc.want)
					}
				}
			})
		}
	}
}
