package daemon

import (
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// unsureNote tells the next daemon after a clean stop which flows have a source that may be
// spoofed: conntrack does not know the link that a flow came by.
const unsureNote = "unsure"

// An unsureEntry is one such flow.
type unsureEntry struct {
	Src netip.AddrPort `json:"src"`
	Dst netip.AddrPort `json:"dst"`
}

// noteUnsure writes the note, before the tables are removed.
func (d *Daemon) noteUnsure() error {
	var entries []unsureEntry
	if t := d.reconcile.firewall.tables; t != nil {
		err := t.NewUnsure().List(func(x elements.Direction) {
			entries = append(entries, unsureEntry{x.Src.Netip(), x.Dst.Netip()})
		})
		if err != nil {
			return err
		}
	}
	return writeList(d.conntrack.notes, unsureNote, entries)
}

// readUnsure returns what the note says.
func (n notes) readUnsure() (all []elements.Direction, err error) {
	entries, err := readList[unsureEntry](n, unsureNote)
	for _, e := range entries {
		all = append(all, elements.Direction{Src: cone.EndpointFrom(e.Src), Dst: cone.EndpointFrom(e.Dst)})
	}
	return all, err
}
