package handover

import (
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
)

// revokedNote tells the next daemon what the user revoked, when nothing in the kernel
// does: after a clean stop, and without nftables.
const revokedNote = "revoked"

// A revokedEntry is one revoked permission in the note.
type revokedEntry struct {
	Ext      netip.AddrPort `json:"ext"`
	Peer     netip.Addr     `json:"peer"`
	Zone     uint16         `json:"zone,omitempty"`
	HostBits uint8          `json:"host_bits,omitempty"`
	Flows    []uint32       `json:"flows,omitempty"` // IDs of the flows that do not bring it back
}

// WriteRevoked writes the note, or removes it if nothing is revoked.
func (n Notes) WriteRevoked(all []cone.Revoked) error {
	entries := make([]revokedEntry, len(all))
	for i, r := range all {
		entries[i] = revokedEntry{r.Ext.Netip(), r.Peer.Netip(), r.Zone, r.HostBits, r.Flows}
	}
	return writeList(n, revokedNote, entries)
}

// Revoked returns what the note says, unless it is too old.
func (n Notes) Revoked() (all []cone.Revoked, err error) {
	entries, err := readList[revokedEntry](n, revokedNote)
	for _, e := range entries {
		all = append(all, cone.Revoked{
			Key:   cone.Key{Ext: cone.EndpointFrom(e.Ext), Peer: cone.AddrFrom(e.Peer), Zone: e.Zone, HostBits: e.HostBits},
			Flows: e.Flows,
		})
	}
	return all, err
}
