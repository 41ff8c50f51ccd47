package daemon

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

const (
	// revokedNote tells the next daemon what the user revoked, when nothing in the kernel
	// does: after a clean stop, and without nftables.
	revokedNote = "revoked"
	// noteLasts is how long the note counts, as long as the set "revoked" in the kernel.
	noteLasts = 2 * time.Hour
)

// A revokedEntry is one revoked permission in the note.
type revokedEntry struct {
	Ext      netip.AddrPort `json:"ext"`
	Peer     netip.Addr     `json:"peer"`
	Zone     uint16         `json:"zone,omitempty"`
	HostBits uint8          `json:"host_bits,omitempty"`
	Flows    []uint32       `json:"flows,omitempty"` // IDs of the flows that do not bring it back
}

// writeRevoked writes the note, or removes it if nothing is revoked.
func (n notes) writeRevoked(all []cone.Revoked) error {
	if len(all) == 0 {
		return n.removeRevoked()
	}
	entries := make([]revokedEntry, len(all))
	for i, r := range all {
		entries[i] = revokedEntry{r.Ext.Netip(), r.Peer.Netip(), r.Zone, r.Wild, r.Flows}
	}
	text, err := json.Marshal(entries)
	if err != nil {
		return fmt.Errorf("note what is revoked: %w", err)
	}
	if err := n.write(revokedNote, string(text), 0o600); err != nil {
		return fmt.Errorf("note what is revoked: %w", err)
	}
	return nil
}

// readRevoked returns what the note says, unless it is too old.
func (n notes) readRevoked() (all []cone.Revoked, err error) {
	text, mine, err := n.read(revokedNote)
	if err != nil {
		return nil, fmt.Errorf("read what is revoked: %w", err)
	}
	if info, err := os.Stat(n.file(revokedNote)); !mine || err != nil || time.Since(info.ModTime()) > noteLasts {
		return nil, nil
	}
	var entries []revokedEntry
	if err := json.Unmarshal([]byte(text), &entries); err != nil {
		return nil, fmt.Errorf("read what is revoked: %w", err)
	}
	for _, e := range entries {
		all = append(all, cone.Revoked{
			Key:   cone.Key{Ext: cone.EndpointFrom(e.Ext), Peer: cone.AddrFrom(e.Peer), Zone: e.Zone, Wild: e.HostBits},
			Flows: e.Flows,
		})
	}
	return all, nil
}

func (n notes) removeRevoked() error {
	if err := n.remove(revokedNote, false); err != nil {
		return fmt.Errorf("remove what is noted as revoked: %w", err)
	}
	return nil
}
