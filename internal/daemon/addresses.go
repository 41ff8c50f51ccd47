package daemon

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/mapping"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// forgetAddresses ends the mappings to addresses that the gateway's links have lost, and
// the flows with these addresses that the kernel does not end. An address that no link ever
// had, as in a routed network that the user translates to, is not lost, nor is one that a rule
// names: without us its flows would stay, and go on if a link gets it back. What an earlier
// daemon left is known too: the tables hold the addresses of mappings, and children show
// theirs. It returns notes for the log.
func (f *firewall) forgetAddresses(cfg config.Config, network gateway.Network) (notes []string, err error) {
	var kernel *elements.Mappings // nil without mappings
	c := f.mappingConfig(cfg)
	if c != nil && f.maps() {
		kernel = f.tables.NewMappings(c)
	}
	rules := sync.OnceValues(f.fixedByRules) // it asks all rules, and few calls need it
	mayBeFixed := func(a netip.Addr) bool {
		fixed, unknown := rules()
		return unknown || fixed(a)
	}
	f.known = maps.Clone(f.known) // the loop may read the old one
	if err := f.knowAddresses(cfg, kernel, network.Owned(), mayBeFixed); err != nil {
		return nil, err
	}
	var errs []error
	var now []netip.Addr
	for _, a := range network.Addrs {
		addr := a.Prefix.Addr()
		if addr.IsLoopback() || addr.IsLinkLocalUnicast() && addr.Is6() || slices.Contains(now, addr) {
			continue
		}
		now = append(now, addr)
		if _, old := f.known[cone.AddrFrom(addr)]; !old && kernel != nil && addr.Is4() { // it may have come back
			errs = append(errs, kernel.Return(addr))
		}
	}
	gone := make(map[cone.Addr]struct{})
	for a := range f.known {
		if slices.Contains(now, a.Netip()) {
			continue
		}
		if fixed, _ := rules(); !fixed(a.Netip()) {
			gone[a] = struct{}{}
		}
	}
	if kernel != nil {
		errs = append(errs, kernel.NoteAddresses(slices.DeleteFunc(slices.Clone(now), netip.Addr.Is6))) // each time: somebody may have deleted them
	}
	for _, a := range now {
		f.known[cone.AddrFrom(a)] = struct{}{}
	}
	if kernel != nil {
		given := sync.OnceValue(func() *mapping.Given { return f.given(c, network) }) // few calls need it, too
		errs = append(errs, f.noteMasqueraded(kernel, func(a netip.Addr) bool {
			_, unknown := rules()
			return mayBeFixed(a) && (unknown || given() == nil || given().Named(a))
		}), f.endNamed(kernel, given, now))
	}
	if len(gone) == 0 {
		return nil, errors.Join(errs...)
	}
	ended, err := forget(f.fixedFlows(cfg), kernel, gone)
	if errs = append(errs, err); err == nil {
		for a := range gone {
			delete(f.known, a)
			if kernel != nil && a.Is4() {
				errs = append(errs, kernel.DropAddresses([]netip.Addr{a.Netip()}))
			}
			if n := ended[a]; n > 0 {
				notes = append(notes, fmt.Sprintf("address %v is gone: %s ended, of children and of hosts with mappings", a, control.Several(n, "flow")))
			}
		}
	}
	return notes, errors.Join(errs...)
}

// endNamed ends mappings on lost addresses that a rule names, but not for the mapping's host. now are
// the addresses that links have.
func (f *firewall) endNamed(kernel *elements.Mappings, given func() *mapping.Given, now []netip.Addr) error {
	var lost []netip.Addr
	for a := range f.known {
		if a := a.Netip(); !slices.Contains(now, a) {
			lost = append(lost, a)
		}
	}
	slices.SortFunc(lost, netip.Addr.Compare)
	if slices.Equal(lost, f.lost) || given() == nil {
		return nil
	}
	if err := given().EndFormer(kernel); err != nil {
		return err
	}
	f.lost = lost
	return nil
}

// noteMasqueraded tells the kernel which addresses are lost if no link has them, for the time
// when no daemon runs: those that no rule names for a host with a mapping. A mapping must not go on
// to them, but must to others, as to those in a VRF, which the kernel would not find: fib asks the
// table local alone.
func (f *firewall) noteMasqueraded(kernel *elements.Mappings, mayBeFixed func(netip.Addr) bool) error {
	var lost []netip.Addr
	for a := range f.known {
		if a.Is4() && !f.withVRF && !mayBeFixed(a.Netip()) {
			lost = append(lost, a.Netip())
		}
	}
	return kernel.SetMasqueraded(lost)
}

// fixedByRules returns a function that reports whether a rule of the user's translates sources
// to an address, and whether there may be others.
func (f *firewall) fixedByRules() (fixed func(netip.Addr) bool, unknown bool) {
	rules, unknown := f.fixedSources()
	return rules.Has, unknown
}

// knowAddresses notes the addresses of an earlier daemon's time: once those of mappings, and
// once those of children that no rule gives now, so that a link must have had them.
func (f *firewall) knowAddresses(cfg config.Config, kernel *elements.Mappings, owned func(cone.Addr) bool, fixed func(netip.Addr) bool) error {
	if f.known == nil {
		known := make(map[cone.Addr]struct{})
		err := f.fixedFlows(cfg).Each(func(sent *cone.Flow) {
			a := sent.ReplyDst.Addr
			if sent.IsChild() && a.Is4() && !owned(a) && !fixed(a.Netip()) {
				known[a] = struct{}{}
			}
		})
		if err != nil {
			return err
		}
		f.known = known
	}
	if kernel == nil || f.knownMapped {
		return nil
	}
	noted, err := kernel.Addresses()
	if err != nil {
		return err
	}
	for _, a := range noted {
		f.known[cone.AddrFrom(a)] = struct{}{}
	}
	f.knownMapped = true
	return nil
}

// forget ends the mappings and flows of addresses that are gone, and returns how many
// flows of each ended.
func forget(fixed *flows.Fixed, kernel *elements.Mappings, gone map[cone.Addr]struct{}) (ended map[cone.Addr]int, err error) {
	var errs []error
	ended = make(map[cone.Addr]int)
	// Repeat until there are no flows: a packet that found its mapping before may make
	// a flow a moment later.
	for range 10 {
		for a := range gone {
			if kernel != nil && a.Is4() {
				errs = append(errs, kernel.Forget(a.Netip()))
			}
		}
		wrong, err := fixed.End(func(f *cone.Flow) bool {
			_, ok := gone[f.ReplyDst.Addr]
			return ok
		})
		errs = append(errs, err)
		for _, f := range wrong {
			ended[f.ReplyDst.Addr]++
		}
		if len(wrong) == 0 || err != nil {
			break
		}
	}
	return ended, errors.Join(errs...)
}

// fixedFlows are the flows whose outside address stays as it is.
func (f *firewall) fixedFlows(cfg config.Config) *flows.Fixed {
	var mapped, translated []netip.Prefix
	if c := f.mappingConfig(cfg); c != nil && f.maps() {
		mapped = c.Subnets
	}
	for _, s := range cfg.Subnets {
		if !s.Routed {
			translated = append(translated, s.Prefix)
		}
	}
	return flows.NewFixed(mapped, translated)
}

// within reports whether an address is in one of the prefixes.
func within(all []netip.Prefix, a cone.Addr) bool {
	return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(a.Netip()) })
}
