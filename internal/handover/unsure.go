package handover

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// unsureNote tells the next daemon after a clean stop which flows have a source that may be
// spoofed: conntrack does not know the link that a flow came by.
const unsureNote = "unsure"

// unsureFlows are flows whose source may be spoofed, and the links that the key inside named when
// the note was written.
type unsureFlows struct {
	Inside []string      `json:"inside"`
	Flows  []unsureEntry `json:"flows"`
}

type unsureEntry struct {
	Src netip.AddrPort `json:"src"`
	Dst netip.AddrPort `json:"dst"`
}

// WriteUnsure writes the note, or removes it if there are no such flows. inside are the links
// for which the user vouches now.
func (n Notes) WriteUnsure(inside []string, flows []elements.Direction) error {
	var all []unsureFlows
	if len(flows) > 0 {
		x := unsureFlows{Inside: inside}
		for _, d := range flows {
			x.Flows = append(x.Flows, unsureEntry{d.Src.Netip(), d.Dst.Netip()})
		}
		all = append(all, x)
	}
	return writeList(n, unsureNote, all)
}

// Unsure returns what the note says. It says nothing any more if the user vouches for other
// links now.
func (n Notes) Unsure(inside []string) (all []elements.Direction, err error) {
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
