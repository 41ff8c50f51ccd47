//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// gatewaySet has the IPv4 addresses that links of the gateway have, as the daemon last
// saw them. It outlives the daemon, so that the next one sees which of them went.
const gatewaySet = "gateway_addresses"

func (l *layout) gatewayAddresses() {
	l.set(gatewaySet, nftables.TypeIPAddr).free = true
}

// Addresses lists the addresses of the gateway that were noted.
func (m *Mappings) Addresses() (all []netip.Addr, err error) {
	err = dump(m.netns, m.table, gatewaySet, func(key, _ []byte, _ time.Duration) {
		if a, ok := netip.AddrFromSlice(key); ok {
			all = append(all, a)
		}
	})
	return all, err
}

// NoteAddresses notes addresses, which are IPv4, and DropAddresses the opposite. It is no
// error if that is so already.
func (m *Mappings) NoteAddresses(as []netip.Addr) error {
	return m.changeAddresses(as, unix.NFT_MSG_NEWSETELEM)
}

// DropAddresses forgets addresses that were noted.
func (m *Mappings) DropAddresses(as []netip.Addr) error {
	return m.changeAddresses(as, unix.NFT_MSG_DELSETELEM)
}

func (m *Mappings) changeAddresses(as []netip.Addr, typ uint16) error {
	var errs []error
	for base := 0; base < len(as); base += batch {
		part := as[base:min(base+batch, len(as))]
		clear(m.errs[:])
		transact(&m.batcher, part, 1, func(seq uint32, a *netip.Addr) {
			e := &m.enc
			list, element := m.openElement(m.table, gatewaySet, seq, typ, 0)
			m.data(unix.NFTA_SET_ELEM_KEY, a.AsSlice())
			e.EndNest(element)
			e.EndNest(list)
			e.End()
		})
		for _, err := range m.errs[:len(part)] {
			if err != nil && !errors.Is(err, unix.ENOENT) {
				errs = append(errs, fmt.Errorf("change set %s: %w", gatewaySet, nfnl.Permitted(err)))
			}
		}
	}
	return errors.Join(errs...)
}
