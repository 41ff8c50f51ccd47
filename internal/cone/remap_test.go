package cone

import (
	"fmt"
	"testing"
)

// TestRemaps checks whether peers lately see a single outside port of an inside port, which
// may change both ways. With mapping nothing is compared. It fails if the first endpoint
// counts, or if old observations weigh as much as new ones.
func TestRemaps(t *testing.T) {
	for _, mapping := range []bool{false, true} {
		d := newDesk(t, func(p *Policy) {
			p.Subnets = []Subnet{{Prefix: p.Subnets[0].Prefix, Mapping: mapping}}
		})
		peer := 0
		see := func(n int, in string, port func(i int) uint16) {
			for i := range n {
				peer++
				d.id++
				p := ep(fmt.Sprintf("203.0.113.%d:%d", 1+peer%250, 9))
				d.m.FlowSeen(0, &Flow{
					ID: d.id, Status: StatusSrcNAT, Src: ep(in), Dst: p, ReplySrc: p,
					ReplyDst: Endpoint{ep("198.51.100.1:1").Addr, port(i)},
				})
				d.carry()
			}
		}
		same := func(int) uint16 { return 50000 } // not its own, but always the same
		other := func(i int) uint16 { return uint16(30000 + i) }
		for _, step := range []struct {
			n, compared, remapped int
			port                  func(int) uint16
			want                  bool
		}{
			{30, 29, 0, same, false},
			{60, 89, 60, other, true},
			{90, 179, 61, same, false},
		} {
			see(step.n, "10.47.11.109:5060", step.port)
			s, compared, remapped := d.m.Stats(), uint64(step.compared), uint64(step.remapped)
			if mapping {
				compared, remapped, step.want = 0, 0, false
			}
			if s.Compared != compared || s.Remapped != remapped || d.m.Remaps() != step.want {
				t.Errorf("mapping %v: %d of %d remapped, want %d of %d; %v", mapping, s.Remapped, s.Compared, remapped, compared, d.m.Remaps())
			}
		}
		see(1, "10.47.11.109:5061", same) // another one's first
		if s := d.m.Stats(); s.Compared > 179 {
			t.Errorf("%d compared", s.Compared)
		}
	}
}

// When the mapping of a subnet changes, what peers saw before says nothing. It fails if
// earlier comparisons stay, or if any new policy ends them.
func TestRemapsAreForgottenWithTheMapping(t *testing.T) {
	var policy Policy
	d := newDesk(t, func(p *Policy) { policy = *p })
	for i := range uint16(20) {
		d.id++
		p := ep(fmt.Sprintf("203.0.113.%d:9", 1+i))
		d.m.FlowSeen(0, &Flow{
			ID: d.id, Status: StatusSrcNAT, Src: ep("10.47.11.109:5060"), Dst: p, ReplySrc: p,
			ReplyDst: Endpoint{ep("198.51.100.1:1").Addr, 30000 + i},
		})
		d.carry()
	}
	d.m.SetPolicy(0, policy)
	if !d.m.Remaps() {
		t.Error("forgotten with the same mapping")
	}
	policy.Subnets = []Subnet{{Prefix: policy.Subnets[0].Prefix, Mapping: true}}
	d.m.SetPolicy(0, policy)
	if d.m.Remaps() {
		t.Error("not forgotten")
	}
}
