package elements

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Teach tells the kernel which outside addresses the user's rules gave to hosts with living
// flows. A newcomer of such a host gets its pool port on the same address.
func (m *Mappings) Teach(ms []Mapping) error {
	byLink := map[*LinkSets][]Mapping{}
	for _, p := range ms {
		if l := m.links[p.Link]; l != nil {
			byLink[l] = append(byLink[l], p)
		}
	}
	var errs []error
	for l, ms := range byLink {
		errs = append(errs, m.teach(l, ms))
	}
	return errors.Join(errs...)
}

func (m *Mappings) teach(l *LinkSets, ms []Mapping) error {
	nobody := cone.AddrFrom4([4]byte{})
	known := map[cone.Addr]struct{}{nobody: {}} // the outside addresses
	err := m.w.list(l.Translated, func(key, _ []byte, _ time.Duration) {
		if len(key) == addressLen {
			known[cone.AddrFrom4([4]byte(key))] = struct{}{}
		}
	})
	if err != nil {
		return err
	}
	old := len(known)
	hosts := map[cone.Addr]cone.Addr{}
	for _, p := range ms {
		known[p.Ext.Addr] = struct{}{}
		hosts[p.Int.Addr] = p.Ext.Addr
	}
	var es []setElement
	if len(known) > old || old == 1 {
		es = append(es, setElement{set: l.Addresses, key: nobody, value: ms[0].Ext.Addr, isMap: true})
		for a := range known {
			es = append(es, setElement{set: l.Translated, key: a})
		}
	}
	if len(known) > 2 {
		es = append(es, setElement{set: l.Several, key: nobody})
		for in, ext := range hosts {
			es = append(es, setElement{set: l.Addresses, key: in, value: ext, isMap: true, timeout: AddressTimeout})
		}
	}
	return m.addElements(es)
}

// Assume tells the kernel the outside address of hosts on a link. It does nothing if the
// kernel has learned one from flows.
func (m *Mappings) Assume(link string, addr netip.Addr) error {
	l, nobody := m.links[link], cone.AddrFrom4([4]byte{})
	if l == nil || !addr.Is4() {
		return nil
	}
	known := false
	if err := m.w.list(l.Translated, func([]byte, []byte, time.Duration) { known = true }); err != nil || known {
		return err
	}
	ext := cone.AddrFrom(addr)
	return m.addElements([]setElement{
		{set: l.Addresses, key: nobody, value: ext, isMap: true},
		{set: l.Translated, key: nobody},
		{set: l.Translated, key: ext},
	})
}

// A setElement is an element of a set or map of addresses.
type setElement struct {
	set        string
	key, value cone.Addr
	isMap      bool
	timeout    time.Duration // 0 means that it never expires
}

// addElements adds es, and refreshes those that exist with the same value.
func (m *Mappings) addElements(es []setElement) error {
	var errs []error
	inBatches(&m.batcher, es, 3, func(seq uint32, x *setElement) {
		copy(m.key[:], x.key[12:])
		value := 0
		if x.isMap {
			value = m.host(x.value)
		}
		for i, typ := range []uint16{unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM} {
			m.element(seq+uint32(i), typ, false, x.set, addressLen, value, x.timeout)
		}
	}, func(_ int, err error) {
		if err != nil && !conflicts(err) { // else the map has another address: the kernel's own knowledge is newer
			errs = append(errs, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
		}
	})
	return errors.Join(errs...)
}

// Forget ends all mappings to an outside address that the gateway lost, and forgets which
// hosts had it. The zero address stands for all addresses. Forget does not end the flows:
// when an address goes, the kernel keeps flows unless MASQUERADE translated them. For ten
// seconds, or until Return, these flows teach no mapping; the caller must end them within
// that time.
func (m *Mappings) Forget(addr netip.Addr) error {
	var ms []Mapping
	var errs []error
	if addr.Is4() {
		errs = append(errs, m.gone(addr, unix.NFT_MSG_NEWSETELEM))
	}
	for _, l := range m.links {
		had := !addr.IsValid()
		errs = append(errs, m.w.list(l.Translated, func(key, _ []byte, _ time.Duration) {
			a, _ := netip.AddrFromSlice(key)
			had = had || a == addr
		}))
		if had { // the next flows tell which addresses are left
			errs = append(errs, m.unteach(l))
		}
	}
	errs = append(errs, m.List(func(p Mapping, _ time.Duration) {
		if !addr.IsValid() || p.Ext.Addr.Netip() == addr {
			ms = append(ms, p)
		}
	}), m.RevokeLost(ms))
	return errors.Join(errs...)
}

// A Former is an outside address that the user's rules gave a host and no longer give it.
type Former struct{ Host, Addr cone.Addr }

const formerLen = 2 * addressLen

// Leave lets the flows of hosts with their former outside addresses teach no mapping, for
// rules.MappingConfig.KeptFor.
func (m *Mappings) Leave(fs []Former) error {
	return m.formers(fs, unix.NFT_MSG_NEWSETELEM, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM)
}

// Regain ends Leave for the formers for which again returns true.
func (m *Mappings) Regain(again func(f Former) bool) error {
	var fs []Former
	err := m.w.list(FormerSet, func(key, _ []byte, _ time.Duration) {
		if len(key) != formerLen {
			return
		}
		f := Former{cone.AddrFrom4([4]byte(key)), cone.AddrFrom4([4]byte(key[addressLen:]))}
		if again(f) {
			fs = append(fs, f)
		}
	})
	return errors.Join(err, m.formers(fs, unix.NFT_MSG_DELSETELEM))
}

func (m *Mappings) formers(fs []Former, types ...uint16) error {
	return changeSet(m, FormerSet, fs, uint32(len(types)), func(seq uint32, f *Former) {
		copy(m.key[:], f.Host[12:])
		copy(m.key[addressLen:], f.Addr[12:])
		for i, typ := range types {
			m.element(seq+uint32(i), typ, false, FormerSet, formerLen, 0, m.keptFor)
		}
	})
}

// changeSet sends what encode makes of each of es: per messages about an element of set. It is
// no error to delete an element that is not there.
func changeSet[E any](m *Mappings, set string, es []E, per uint32, encode func(seq uint32, e *E)) error {
	var errs []error
	inBatches(&m.batcher, es, per, encode, func(_ int, err error) {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("change set %s: %w", set, nfnl.Permitted(err)))
		}
	})
	return errors.Join(errs...)
}

// Taught calls f for each outside address that flows have taught the kernel: on a link, for a host,
// or for all hosts if host is the zero address. It uses its own connection.
func (m *Mappings) Taught(f func(link string, host, addr cone.Addr)) error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, m.w.list(l.Addresses, func(key, value []byte, _ time.Duration) {
			if len(key) == addressLen && len(value) == addressLen {
				f(l.Link, cone.AddrFrom4([4]byte(key)), cone.AddrFrom4([4]byte(value)))
			}
		}))
	}
	return errors.Join(errs...)
}

// Unteach forgets all outside addresses on a link. The next flows tell them.
func (m *Mappings) Unteach(link string) error {
	if l := m.links[link]; l != nil {
		return m.unteach(l)
	}
	return nil
}

func (m *Mappings) unteach(l *LinkSets) error { return m.empty(l.Translated, l.Several, l.Addresses) }

// empty deletes all elements of the sets.
func (m *Mappings) empty(sets ...string) error {
	clear(m.errs[:len(sets)])
	transact(&m.batcher, sets, 1, func(seq uint32, set *string) {
		e := &m.enc
		e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_DELSETELEM, unix.NLM_F_REQUEST, seq, unix.AF_INET)
		e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, m.w.table)
		e.Str(unix.NFTA_SET_ELEM_LIST_SET, *set)
		e.End()
	})
	var errs []error
	for i, err := range m.errs[:len(sets)] {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("empty set %s: %w", sets[i], nfnl.Permitted(err)))
		}
	}
	return errors.Join(errs...)
}

// Return lets the flows of an outside address that came back teach mappings again.
func (m *Mappings) Return(addr netip.Addr) error { return m.gone(addr, unix.NFT_MSG_DELSETELEM) }

func (m *Mappings) gone(addr netip.Addr, typ uint16) error {
	return m.changeAddresses(GoneSet, []netip.Addr{addr}, typ, goneTimeout)
}

// Addresses lists the gateway addresses that NoteAddresses noted.
func (m *Mappings) Addresses() ([]netip.Addr, error) { return m.addressesIn(GatewaySet) }

func (m *Mappings) addressesIn(set string) (all []netip.Addr, err error) {
	err = m.w.list(set, func(key, _ []byte, _ time.Duration) {
		if a, ok := netip.AddrFromSlice(key); ok {
			all = append(all, a)
		}
	})
	return all, err
}

// SetMasqueraded says which IPv4 addresses are lost if no link has them: the kernel ends a
// mapping to one when a packet finds it then. Without an element for an address its mapping
// goes on, as to an address that no link need have.
func (m *Mappings) SetMasqueraded(as []netip.Addr) error {
	old, err := m.addressesIn(MasqueradedSet)
	if err != nil {
		return err
	}
	among := func(all []netip.Addr) func(netip.Addr) bool {
		return func(a netip.Addr) bool { return slices.Contains(all, a) }
	}
	return errors.Join(
		m.changeAddresses(MasqueradedSet, slices.DeleteFunc(slices.Clone(as), among(old)), unix.NFT_MSG_NEWSETELEM, 0),
		m.changeAddresses(MasqueradedSet, slices.DeleteFunc(old, among(as)), unix.NFT_MSG_DELSETELEM, 0))
}

// NoteAddresses notes IPv4 addresses of the gateway. It is no error if some are noted
// already.
func (m *Mappings) NoteAddresses(as []netip.Addr) error {
	return m.changeAddresses(GatewaySet, as, unix.NFT_MSG_NEWSETELEM, 0)
}

// DropAddresses forgets noted addresses. It is no error if some are not noted.
func (m *Mappings) DropAddresses(as []netip.Addr) error {
	return m.changeAddresses(GatewaySet, as, unix.NFT_MSG_DELSETELEM, 0)
}

func (m *Mappings) changeAddresses(set string, as []netip.Addr, typ uint16, timeout time.Duration) error {
	return changeSet(m, set, as, 1, func(seq uint32, a *netip.Addr) {
		m.element(seq, typ, false, set, copy(m.key[:], a.AsSlice()), 0, timeout)
	})
}
