package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// unsureNote tells the next daemon after a clean stop which flows have a source that may be
// spoofed: conntrack does not know the link that a flow came by.
const unsureNote = "unsure"

// unsureFlows are such flows, and the links on which the user vouched for sources then.
type unsureFlows struct {
	Inside []string      `json:"inside"`
	Flows  []unsureEntry `json:"flows"`
}

type unsureEntry struct {
	Src netip.AddrPort `json:"src"`
	Dst netip.AddrPort `json:"dst"`
}

// noteUnsure writes the note, before the tables are removed.
func (d *Daemon) noteUnsure() error {
	var all []unsureFlows
	if t := d.reconcile.firewall.tables; t != nil {
		x := unsureFlows{Inside: d.loop.cfg.Inside}
		err := t.NewUnsure().List(func(d elements.Direction) {
			x.Flows = append(x.Flows, unsureEntry{d.Src.Netip(), d.Dst.Netip()})
		})
		if err != nil {
			return err
		}
		if len(x.Flows) > 0 {
			all = append(all, x)
		}
	}
	return writeList(d.conntrack.notes, unsureNote, all)
}

// readUnsure returns what the note says. It says nothing any more if the user vouches for other
// links now.
func (n notes) readUnsure(inside []string) (all []elements.Direction, err error) {
	noted, err := readList[unsureFlows](n, unsureNote)
	for _, x := range noted {
		if !slices.Equal(x.Inside, inside) {
			continue
		}
		for _, e := range x.Flows {
			all = append(all, elements.Direction{Src: cone.EndpointFrom(e.Src), Dst: cone.EndpointFrom(e.Dst)})
		}
	}
	return all, err
}
