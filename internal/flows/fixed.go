package flows

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/gateway"
)

// Fixed are the flows whose outside address stays as it is: those with a mapping, which
// IPv4 hosts have, and children, to which all belongs that a host sends to that port of its peer. The
// kernel itself ends masqueraded flows when their address or link changes, but not these.
type Fixed struct {
	mapped, translated *cone.PrefixTable
	maps               bool // there is a subnet with mappings
}

// NewFixed returns these flows of hosts in subnets with mappings, and of hosts behind source NAT.
func NewFixed(mapped, translated []netip.Prefix) *Fixed {
	return &Fixed{cone.NewPrefixTable(mapped), cone.NewPrefixTable(translated), len(mapped) > 0}
}

// asSent returns f, if it is one of these flows, as its host sends it: from Src to ReplySrc,
// with the address of ReplyDst outside.
func (x *Fixed) asSent(f *cone.Flow) (sent cone.Flow, ok bool) {
	switch {
	case f.IsChild():
		return f.Turned(), x.translated.Holds(f.ReplySrc.Addr)
	case f.Status.Has(cone.StatusSrcNAT):
		return *f, f.Src.Addr.Is4() && x.mapped.Holds(f.Src.Addr)
	}
	return cone.Flow{}, false
}

// Each calls f for each of these flows, as its host sends it.
func (x *Fixed) Each(f func(sent *cone.Flow)) error {
	_, err := x.End(func(sent *cone.Flow) bool {
		f(sent)
		return false
	})
	return err
}

// End ends those of these flows for which wrong returns true, and returns them as their hosts
// send them.
func (x *Fixed) End(wrong func(sent *cone.Flow) bool) (ended []cone.Flow, err error) {
	_, err = DeleteIf(func(f *cone.Flow) bool {
		sent, ok := x.asSent(f)
		if ok = ok && wrong(&sent); ok {
			ended = append(ended, sent)
		}
		return ok
	})
	return ended, err
}

// DeleteIf deletes the flows for which wrong returns true, and returns how many.
func DeleteIf(wrong func(f *cone.Flow) bool) (deleted int, err error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	var flows []cone.Flow
	err = q.Dump(func(f *cone.Flow) {
		if wrong(f) {
			flows = append(flows, *f)
		}
	})
	deleted, failed := Delete(q, flows)
	return deleted, errors.Join(err, failed)
}

// Delete deletes flows from the conntrack table, and returns how many. One that is gone is no error.
func Delete(q *ctwatch.Queries, flows []cone.Flow) (deleted int, err error) {
	var errs []error
	for _, f := range flows {
		ok, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		if errs = append(errs, err); ok {
			deleted++
		}
	}
	return deleted, errors.Join(errs...)
}

// EndWrongLinks ends flows with mappings whose outside address is wrong for the link by which
// they leave now. doubtful counts flows for which that is not sure. outside has the names of
// current and former outside links; fixed are the addresses to which rules of the user's
// translate, and unknown says that there may be others. It closes routes.
func (x *Fixed) EndWrongLinks(
	network gateway.Network, routes *Router, outside map[string]bool, fixed cone.AddrRanges, unknown bool,
) (ended, doubtful int, err error) {
	if !x.maps || network.HidesWays(gateway.IPv4) {
		return 0, 0, nil
	}
	links := make(map[cone.Addr]string)
	for _, a := range network.Addrs {
		for _, l := range network.Links {
			if l.Index == a.Link && outside[l.Name] {
				links[cone.AddrFrom(a.Prefix.Addr())] = l.Name
			}
		}
	}
	type way struct {
		host cone.Addr
		link string
	}
	right := make(map[way]bool) // the host has a flow there with the link's own address
	surely := func(f *cone.Flow) bool {
		return !unknown && !fixed.Has(f.ReplyDst.Addr.Netip())
	}
	// Doubtful flows are checked again once all flows were seen.
	wrong := func(last bool) func(f *cone.Flow) bool {
		return func(f *cone.Flow) bool {
			link, onLink := links[f.ReplyDst.Addr]
			if !onLink || f.Status.Has(cone.StatusDstNAT) { // children are DNATed, too
				return false
			}
			ways, _ := routes.Links(f)
			if len(ways) == 0 {
				return false
			}
			for _, w := range ways {
				if w.Name == link {
					right[way{f.Src.Addr, link}] = len(ways) == 1 || right[way{f.Src.Addr, link}]
					return false
				}
			}
			if surely(f) || right[way{f.Src.Addr, ways[0].Name}] {
				return true
			}
			if last {
				doubtful++
			}
			return false
		}
	}
	var errs []error
	for _, last := range []bool{false, true} {
		if last && !unknown && len(fixed) == 0 {
			break
		}
		flows, err := x.End(wrong(last))
		ended += len(flows)
		errs = append(errs, err)
	}
	if err := routes.Close(); err != nil {
		errs = append(errs, fmt.Errorf("find flows that leave by another link: %w", err))
	}
	return ended, doubtful, errors.Join(errs...)
}
