package daemon

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/portpool"
)

// betweenLooks is the time between two looks at the gateway's sockets. A socket that both
// looks find counts as lasting, one that neither finds as gone. The short-lived sockets of
// resolvers end no permission or mapping.
const betweenLooks = time.Second

// outsidePorts are the ports that mappings may and may not have.
type outsidePorts struct {
	pools  map[config.PortPool]cone.PortRanges // ports for newcomers, by each port_pool in use
	served []uint16                            // ports that no new mapping gets, sorted
	barred []uint16                            // ports in served on which existing mappings end

	// udpTimeout is how long conntrack keeps a flow without an answer.
	udpTimeout time.Duration
}

// choosePorts returns the outside ports for mappings. sure says that two looks found the
// sockets. It skips ports of sockets and forwards in a pool, with a warning. If no pool is
// left, the error says how to make one.
func (f *firewall) choosePorts(cfg config.Config, network gateway.Network, sockets *gateway.PortSet, sure bool,
	forwarded func(cone.Endpoint) bool,
) (ports outsidePorts, out warnings, err error) {
	if !wantsMapping(cfg) {
		return ports, nil, nil
	}
	local, err := portpool.ReadLocal()
	if err != nil {
		return ports, nil, err
	}
	timeouts, err := readTimeouts()
	if err != nil {
		return ports, nil, err
	}
	ports.udpTimeout = max(timeouts.UDP, timeouts.Stream) // an unanswered flow may have been answered before
	ports.pools = make(map[config.PortPool]cone.PortRanges)
	pools := poolsOf(cfg)
	for _, wanted := range pools {
		pool, ok := local.Choose(wanted)
		all, old := wanted.Ranges(), f.ports.pools[wanted]
		switch {
		case !ok && len(old) > 0: // it was clear before
			pool = old
			out.addWithFix(warnPoolOverlaps, aboutPool(cfg, wanted), local.Reserve(pool), "%s", local.Overlap(pool))
		case !ok:
			return ports, nil, &portpool.Error{Text: local.Overlap(all), Fix: local.Reserve(all)}
		case pool.Len() < min(portpool.Wanted, all.Len()) || len(all) > 0 && !pool.Overlaps(all):
			out.addWithFix(warnPoolMoved, aboutPool(cfg, wanted), local.Reserve(all), "hosts get outside ports %v: %s", pool.Text(), local.Overlap(all))
		}
		ports.pools[wanted] = pool
	}
	addrs := f.translatedAddrs(network)
	served := servedPorts(addrs, sockets)
	ports.served = sorted(slices.Concat(cfg.ExcludePorts, served))
	ports.barred = cfg.ExcludePorts
	if sure {
		ports.barred = slices.Clone(ports.served)
		if w := f.inPool(ports.all(), served); w != "" {
			out.add(warnPoolServed, "", "%s", w)
		}
	}
	for _, wanted := range pools {
		pool, about := ports.pools[wanted], aboutPool(cfg, wanted)
		switch all := forwardedPorts(pool, addrs, forwarded); {
		case len(all) == 0:
		case len(all) == pool.Len(): // to skip them would leave no pool
			out.add(warnPoolForwarded, about, "rules of yours forward all of port_pool %v: hosts that get a port of it are reached by nobody new", pool.Text())
		default:
			out.add(warnPoolForwarded, about, "rules of yours forward ports of port_pool %v, such as %d: hosts get the other ones", pool.Text(), all[0])
			ports.served = sorted(append(ports.served, all...))
		}
	}
	return ports, out, nil
}

// poolsOf returns each port_pool that hosts with mappings have.
func poolsOf(cfg config.Config) (pools []config.PortPool) {
	for _, s := range cfg.Subnets {
		if s.Mapping == config.EndpointIndependentMapping && !slices.Contains(pools, cfg.Pool(s)) {
			pools = append(pools, cfg.Pool(s))
		}
	}
	return pools
}

// aboutPool returns what a warning about a pool is about: nothing for the port_pool of all
// subnets, else the pool.
func aboutPool(cfg config.Config, pool config.PortPool) string {
	if pool == cfg.PortPool {
		return ""
	}
	return pool.String()
}

// all returns the ports of all pools.
func (p *outsidePorts) all() (all cone.PortRanges) {
	for _, wanted := range slices.Sorted(maps.Keys(p.pools)) {
		all = append(all, p.pools[wanted]...)
	}
	return all
}

// poolText names the ports of all pools, as they are configured; it is empty without any.
func poolText(cfg config.Config) string {
	var texts []string
	for _, p := range poolsOf(cfg) {
		if p != config.NoPool {
			texts = append(texts, p.String())
		}
	}
	return strings.Join(texts, ",")
}

// samePools reports whether two have the same pools.
func samePools(a, b map[config.PortPool]cone.PortRanges) bool {
	return maps.EqualFunc(a, b, func(x, y cone.PortRanges) bool { return slices.Equal(x, y) })
}

// readTimeouts reads how long conntrack keeps UDP flows.
func readTimeouts() (t cone.Timeouts, err error) {
	for key, timeout := range map[string]*time.Duration{
		"nf_conntrack_udp_timeout":        &t.UDP,
		"nf_conntrack_udp_timeout_stream": &t.Stream,
	} {
		seconds, err := handover.Read(key)
		if err != nil {
			return t, fmt.Errorf("read timeout of UDP flows: %w", err)
		}
		*timeout = time.Duration(seconds) * time.Second
	}
	return t, nil
}

// inPool returns a warning if some of the served ports, which sockets of the gateway have,
// are in the pool. It names the same port for as long as that is in use, since others may
// come and go.
func (f *firewall) inPool(pool cone.PortRanges, served []uint16) string {
	if !pool.Has(f.portInPool) || !slices.Contains(served, f.portInPool) {
		i := slices.IndexFunc(served, pool.Has)
		if i < 0 {
			return ""
		}
		f.portInPool = served[i]
	}
	return fmt.Sprintf("sockets of the gateway have ports of port_pool %v, such as %d ('ss -ulnp sport = :%d' names the program): hosts get the other ones",
		pool.Text(), f.portInPool, f.portInPool)
}

// translatedAddrs returns the gateway's addresses to which hosts are translated: those on
// outside links, and others that mappings had, since rules may translate to an address of lo.
func (f *firewall) translatedAddrs(network gateway.Network) map[cone.Addr]string {
	all := outsideAddrs(network)
	for _, a := range network.Addrs {
		addr := cone.AddrFrom(a.Prefix.Addr())
		if _, mapped := f.mappedAddrs[addr]; mapped {
			all[addr] = "" // on no outside link
		}
	}
	return all
}

// servedPorts returns the ports of sockets that are bound to all addresses or to an
// outside one.
func servedPorts(outside map[cone.Addr]string, sockets *gateway.PortSet) (all []uint16) {
	for e := range sockets.All() {
		_, isOutside := outside[e.Addr]
		if (isOutside || e.Addr == cone.AddrFrom4([4]byte{})) && e.Port != 0 {
			all = append(all, e.Port)
		}
	}
	return sorted(all)
}

// forwardedPorts returns the ports of the pool that rules of the user's forward on one of the
// outside addresses.
func forwardedPorts(pool cone.PortRanges, outside map[cone.Addr]string, forwarded func(cone.Endpoint) bool) (all []uint16) {
	for a := range outside {
		for _, r := range pool {
			for p := int(r.First); a.Is4() && forwarded != nil && p <= int(r.Last); p++ {
				if forwarded(cone.Endpoint{Addr: a, Port: uint16(p)}) {
					all = append(all, uint16(p))
				}
			}
		}
	}
	return sorted(all)
}

func sorted(ports []uint16) []uint16 {
	slices.Sort(ports)
	return slices.Compact(ports)
}

// lookAtSockets reads the sockets of the gateway. It ends permissions and mappings on the
// ports of sockets that the last look found, too. It does nothing within about a second of
// that look.
func (r *reconciler) lookAtSockets(cfg config.Config, network gateway.Network) error {
	if r.now()-r.looked < betweenLooks*9/10 {
		return nil
	}
	r.ports.SetNetwork(network)
	held, err := r.ports.Ports()
	if err != nil {
		return err
	}
	before := r.held
	stays := held.Stay(before)
	r.settled = held.Equal(before)
	r.held, r.looked = held, r.now()
	warnings, err := r.serve(cfg, network, stays)
	r.ask(func(l *loop) {
		l.portWarnings = warnings
		l.warned.Tell(r.now(), l.warnings())
		r.served, r.sure = stays, true
		l.engine.SetServed(stays, held.Either(before))
		l.engine.ReviewSockets()
	})
	return errors.Join(err, r.hearServed(cfg))
}

// lookAgain looks at the sockets again if the last look found a change.
func (r *reconciler) lookAgain() error {
	if r.settled {
		return nil
	}
	var cfg config.Config
	r.ask(func(l *loop) { cfg = l.cfg })
	return r.lookAtSockets(cfg, r.network)
}

// serve keeps mappings off the ports that the gateway serves now.
func (r *reconciler) serve(cfg config.Config, network gateway.Network, stays *gateway.PortSet) (out warnings, err error) {
	ports, out, err := r.firewall.choosePorts(cfg, network, stays, true, r.firewall.shared.Covers)
	if err != nil {
		return out, err
	}
	old := r.firewall.ports
	r.firewall.ports = ports
	if !samePools(ports.pools, old.pools) || ports.udpTimeout != old.udpTimeout || !slices.Equal(ports.served, old.served) {
		_, err = r.firewall.set(cfg, network.OutsideLinks())
	}
	return out, err
}
