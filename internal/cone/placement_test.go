package cone

import "testing"

// Fails when place does not ask for connected sockets, and when an expectation is not made
// again when they are closed.
func TestNoExpectationTakesThePacketsOfAConnectedSocket(t *testing.T) {
	const in, peer = "10.47.11.109:1", "203.0.113.5:9"
	key := Key{Ext: ep("198.51.100.1:1"), Peer: ep(peer).Addr}
	other := Key{Ext: ep("198.51.100.1:1"), Peer: ep("203.0.113.6:9").Addr}
	for name, tc := range map[string]struct {
		change    func(*Policy)
		connected Carriers // what carries it then
	}{
		"without the map": {nil, 0},
		"with the map": {func(p *Policy) {
			p.Mapped, p.Subnets = true, []Subnet{{Prefix: p.Subnets[0].Prefix, Choice: ChooseExpectation}}
		}, ByMap},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, tc.change)
			want := func(when string, by Carriers) {
				t.Helper()
				if d.carry(); d.by[key] != by {
					t.Errorf("%s: carried by %q, want %q", when, d.by[key], by)
				}
			}
			d.open(0, in, peer)
			d.m.SetConnected(0, map[Key]struct{}{other: {}})
			want("connected to somebody else", ByExpectation)
			d.m.SetConnected(1, map[Key]struct{}{key: {}})
			want("connected to the peer", tc.connected)
			if v := d.view(in); tc.connected == 0 && (v.State != StateRefused || v.Reason != ReasonLocalSocket) {
				t.Errorf("it is %v for %q", v.State, v.Reason)
			}
			d.m.SetConnected(2, nil)
			d.m.Tick(2*testPolicy.Retry, 10) // what was refused waits for that
			want("closed", ByExpectation)
		})
	}
}
