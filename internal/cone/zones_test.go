package cone

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
)

// inZones returns a translated flow in zones.
func (d *desk) inZones(in, peer string, orig, reply uint16) *Flow {
	f := d.translated(in, peer)
	f.OrigZone, f.ReplyZone = orig, reply
	return f
}

// Zones that flows had stay known, whatever later snapshots show.
//
// Fails when a snapshot forgets them, when hosts that are not enabled do not count, and
// when one of two zones of a subnet is not noted.
func TestZonesOfFlows(t *testing.T) {
	for name, tc := range map[string]struct {
		flows    [][2]uint16 // zones of the original and of the reply direction
		stranger bool        // the last one is of a host that is not enabled
		want     bool
	}{
		"none":                              {flows: [][2]uint16{{0, 0}}},
		"of one direction":                  {flows: [][2]uint16{{250, 0}, {250, 0}}, want: true},
		"of a host that is not enabled":     {flows: [][2]uint16{{0, 0}, {250, 0}}, stranger: true, want: true},
		"of both directions":                {flows: [][2]uint16{{250, 0}, {250, 250}}},
		"of both, of a host not enabled":    {flows: [][2]uint16{{250, 0}, {260, 260}}, stranger: true},
		"two of one subnet":                 {flows: [][2]uint16{{250, 0}, {251, 0}}},
		"one, and none, of one subnet":      {flows: [][2]uint16{{0, 0}, {250, 0}}},
		"two, one of a host not in it":      {flows: [][2]uint16{{250, 0}, {251, 0}}, stranger: true, want: true},
		"of both directions, and then none": {flows: [][2]uint16{{250, 250}, {250, 0}}},
	} {
		t.Run(name, func(t *testing.T) {
			d := newDesk(t, nil)
			for i, zones := range tc.flows {
				in := "10.47.11.109:5060"
				if tc.stranger && i == len(tc.flows)-1 {
					in = "192.168.1.5:5060"
				}
				d.seen(1, d.inZones(in, "203.0.113.5:5060", zones[0], zones[1]))
			}
			d.snapshot(2)
			if z := d.m.Zones(); z.OneDirection() != tc.want {
				t.Errorf("%+v, want %v", z, tc.want)
			}
		})
	}
}

// Outside addresses in zone 0 are noted for both families, so many of each.
//
// Fails when those of one family are not noted, and when many of one leave no room for the other.
func TestOutsideAddressesInZone0(t *testing.T) {
	d := newDesk(t, func(p *Policy) {
		p.Subnets = append(slices.Clone(p.Subnets), Subnet{Prefix: netip.MustParsePrefix("2001:db8:47::/64")})
	})
	for i := range mostOutside + 1 {
		f := d.inZones("[2001:db8:47::109]:5060", "[2001:db8:5::5]:5060", 250, 0)
		f.ReplyDst = ep(fmt.Sprintf("[2001:db8:1::%x]:5060", i+1))
		d.seen(1, f)
	}
	d.seen(1, d.inZones("10.47.11.109:5060", "203.0.113.5:5060", 250, 0))
	z := d.m.Zones().Outside
	if len(z) != mostOutside+1 || !slices.Contains(z, netip.MustParseAddr("198.51.100.1")) {
		t.Errorf("outside addresses %v", z)
	}
}

// The gateway's own flows are of no subnet: their zones do not count as zones of a subnet.
//
// Fails when they do.
func TestZonesOfTheGatewayItself(t *testing.T) {
	d := newDesk(t, func(p *Policy) { p.Self4 = true })
	for i, zone := range []uint16{250, 251} {
		d.seen(1, d.inZones(fmt.Sprintf("198.51.100.1:%d", 5060+i), "203.0.113.5:5060", zone, 0))
	}
	if z := d.m.Zones(); len(z.Several) > 0 {
		t.Errorf("%+v", z)
	}
}

// A second zone is reported only while recent snapshots show it.
//
// Fails when one that was seen once stays.
func TestSecondZoneEnds(t *testing.T) {
	d := newDesk(t, nil)
	translated := d.translated("10.47.11.109:5060", "203.0.113.5:5060")
	plain := d.inZones("10.47.11.109:5060", "203.0.113.5:5060", 1, 1)
	plain.Status, plain.ReplyDst = 0, plain.Src
	d.seen(1, plain)
	d.seen(1, translated)
	want := SecondZone{netip.MustParsePrefix("10.47.11.0/24"), 1}
	for range 2 {
		if all := d.m.SecondZones(); len(all) != 1 || all[0] != want {
			t.Errorf("second zones %v, want %v", all, want)
		}
		d.snapshot(2, plain, translated)
	}
	d.snapshot(3, translated)
	d.snapshot(4, translated)
	if all := d.m.SecondZones(); len(all) != 0 {
		t.Errorf("second zones %v, want none", all)
	}
}
