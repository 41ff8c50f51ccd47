package daemon

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
)

// forgetAddresses ends the mappings to addresses that the gateway's links have lost, and
// the flows with these addresses. An address that no link ever had, as in a routed network
// that the user translates to, is not lost. The tables hold the addresses, so those of an
// earlier daemon's time are known too. It returns notes for the log.
func (f *firewall) forgetAddresses(cfg config.Config, network gateway.Network) (notes []string, err error) {
	c := f.mappingConfig(cfg)
	if c == nil || !f.maps() {
		return nil, nil
	}
	kernel := f.tables.NewMappings(c)
	if f.known == nil { // the first time
		noted, err := kernel.Addresses()
		if err != nil {
			return nil, err
		}
		f.known = make(map[netip.Addr]struct{})
		for _, a := range noted {
			f.known[a] = struct{}{}
		}
	}
	var errs []error
	var now []netip.Addr
	for _, a := range network.Addrs {
		addr := a.Prefix.Addr()
		if !addr.Is4() || addr.IsLoopback() || slices.Contains(now, addr) {
			continue
		}
		now = append(now, addr)
		if _, old := f.known[addr]; !old { // it may have come back
			errs = append(errs, kernel.Return(addr))
		}
	}
	gone := make(map[cone.Addr]struct{})
	for a := range f.known {
		if !slices.Contains(now, a) {
			gone[cone.AddrFrom(a)] = struct{}{}
		}
	}
	errs = append(errs, kernel.NoteAddresses(now)) // each time: somebody may have deleted them
	for _, a := range now {
		f.known[a] = struct{}{}
	}
	ended, err := f.forget(c, gone)
	if errs = append(errs, err); err == nil {
		for a := range gone {
			delete(f.known, a.Netip())
			errs = append(errs, kernel.DropAddresses([]netip.Addr{a.Netip()}))
			if n := ended[a]; n > 0 {
				notes = append(notes, fmt.Sprintf("address %v is gone: %d flows with mappings ended", a, n))
			}
		}
	}
	return notes, errors.Join(errs...)
}

// forget ends the mappings and flows of addresses that are gone, and returns how many
// flows of each ended.
func (f *firewall) forget(c *rules.MappingConfig, gone map[cone.Addr]struct{}) (ended map[cone.Addr]int, err error) {
	var errs []error
	ended = make(map[cone.Addr]int)
	// Repeat until there are no flows: a packet that found its mapping before may make
	// a flow a moment later.
	for range 10 {
		if len(gone) == 0 {
			break
		}
		for a := range gone {
			errs = append(errs, f.tables.NewMappings(c).Forget(a.Netip()))
		}
		flows, err := endFlows(c, func(f *cone.Flow) bool {
			_, ok := gone[f.ReplyDst.Addr]
			return ok
		})
		errs = append(errs, err)
		for _, f := range flows {
			ended[f.ReplyDst.Addr]++
		}
		if len(flows) == 0 || err != nil {
			break
		}
	}
	return ended, errors.Join(errs...)
}

// endFlows ends the translated flows of hosts with mappings for which wrong returns true,
// and returns them. The kernel itself ends masqueraded flows when their address or link
// changes, but not flows with the fixed address of a mapping.
func endFlows(c *rules.MappingConfig, wrong func(*cone.Flow) bool) (flows []cone.Flow, err error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return nil, err
	}
	defer q.Close()
	subnets := cone.NewPrefixTable(c.Subnets)
	err = q.Dump(func(f *cone.Flow) {
		if isMapped(subnets, f) && wrong(f) {
			flows = append(flows, *f)
		}
	})
	return flows, errors.Join(err, deleteFlows(q, flows))
}

func deleteFlows(q *ctwatch.Queries, flows []cone.Flow) error {
	var errs []error
	for _, f := range flows {
		_, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// isMapped reports whether f is a translated flow of a host with mappings.
func isMapped(subnets *cone.PrefixTable, f *cone.Flow) bool {
	return f.Status.Has(cone.StatusSrcNAT) && f.Src.Addr.Is4() && subnets.Holds(f.Src.Addr)
}

// within reports whether an address is in one of the prefixes.
func within(all []netip.Prefix, a cone.Addr) bool {
	return slices.ContainsFunc(all, func(p netip.Prefix) bool { return p.Contains(a.Netip()) })
}
