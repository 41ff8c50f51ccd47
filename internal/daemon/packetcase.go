package daemon

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A packetCase is all that decides what becomes of a packet from peer, whose port is 0 for
// any port that has no flow yet, to the outside endpoint ext.
type packetCase struct {
	peer, ext netip.AddrPort
	owned     bool // packets to ext are for the gateway
	routed    bool // packets to ext are for a host, and nobody translates them
	inside    bool // the peer is in an enabled subnet
	flow      *cone.Flow
	unseen    time.Duration         // how long ago a flow may have begun that the daemon does not know
	local     func(netip.Addr) bool // is an address of the gateway
	// acceptLocal says that such an address may be a source of packets from outside.
	acceptLocal bool
	claims      []control.Permission  // on ext for peer
	others      []control.Permission  // on ext for other peers
	forward     *userrules.Forward    // the first rule that may lead the packet elsewhere
	served      bool                  // a socket of the gateway gets what comes to ext
	diverted    []userrules.Diversion // what rules of the user's take from inside hosts
	most        func(control.Permission) int
	// firewall says what the user's chains do with packets to a host.
	firewall func(host netip.Addr, kind flowKind) (a userrules.Answer, dropper string)
}

// gather reads what decides about the packet.
func (s source) gather(c *packetCase) error {
	var cfg config.Config
	var failed error
	decisions := map[netip.Prefix]decision{}
	var network gateway.Network
	ok := s.do(func(l *loop) {
		cfg, network, c.acceptLocal = l.cfg, l.network, l.acceptsLocal()
		maps.Copy(decisions, l.decisions)
		peer, ext := cone.EndpointFrom(c.peer), cone.EndpointFrom(c.ext)
		if l.engine.Model.Lean() {
			c.unseen = l.unseen()
		}
		for _, zone := range c.zones() {
			f, found, err := l.queries.Get(peer, ext, zone)
			if failed = errors.Join(failed, err); found {
				c.flow = &f
				break
			}
		}
		var err error
		c.served, err = l.sockets.Serves(ext, peer.Addr)
		failed = errors.Join(failed, err)
	})
	if !ok {
		return errEnded
	}
	if failed != nil {
		return fmt.Errorf("look up flow and socket: %w", failed)
	}
	inside, err := c.look(cfg, network)
	if err != nil {
		return err
	}
	rs, err := s.rules()
	if err != nil {
		c.firewall = func(netip.Addr, flowKind) (userrules.Answer, string) { return userrules.Unknown, "" }
		c.forward = &userrules.Forward{Unknown: true, Text: fmt.Sprintf("your rules cannot be read: %v", err)}
		return nil
	}
	outside := arrivingBy(network)
	if len(outside) > 0 {
		c.forward = forwardOf(rs.Forwards(outside), c.peer.Addr(), c.ext)
	}
	if c.forward == nil && rs.ForwardsMayBeHidden() {
		c.forward = &userrules.Forward{Unknown: true, Text: "only root and its group may read the rules of iptables-legacy"}
	}
	var d userrules.Diverter
	c.diverted, _ = d.Diversions(rs, sidesOf(cfg, network))
	c.firewall = func(host netip.Addr, kind flowKind) (userrules.Answer, string) {
		switch to, by := c.ext, inside; kind {
		case ofForward:
			to = c.forwardsTo()
			if links, err := network.LinksTo(0, []netip.Prefix{netip.PrefixFrom(host, host.BitLen())}); err == nil {
				by = flows.LinkOf(links[0])
			}
			fallthrough
		case ofStranger:
			if a, dropper, err := rs.Stranger(outside, by, c.peer, c.ext, to); err == nil {
				return a, dropper.Chain
			}
			return userrules.Unknown, ""
		}
		related := kind == ofExpectation
		for subnet, x := range decisions {
			if subnet.Contains(host) {
				return passes(rs, outside, network, x, host, related)
			}
		}
		return passes(rs, outside, network, decision{}, host, related)
	}
	return nil
}

// zones returns the conntrack zones in which there may be a flow between the endpoints: those of
// permissions on the outside endpoint, and zone 0.
func (c *packetCase) zones() (all []uint16) {
	if c.peer.Port() == 0 {
		return nil
	}
	for _, p := range slices.Concat(c.claims, c.others, []control.Permission{{}}) {
		if !slices.Contains(all, p.Zone) {
			all = append(all, p.Zone)
		}
	}
	return all
}

// look takes in what configuration and network say of the addresses. inside is the link that
// leads to the outside endpoint, if it is a host; without a name if that is not known.
func (c *packetCase) look(cfg config.Config, network gateway.Network) (inside userrules.Link, err error) {
	own := network.Topology().Local
	c.local = func(a netip.Addr) bool { return slices.Contains(own, a) }
	c.owned = c.local(c.ext.Addr()) || network.Owned()(cone.AddrFrom(c.ext.Addr()))
	for _, s := range cfg.Subnets {
		c.inside = c.inside || s.Prefix.Contains(c.peer.Addr())
		c.routed = c.routed || s.Prefix.Contains(c.ext.Addr()) && s.Routed
	}
	c.most = func(p control.Permission) int { // 0 for no limit
		if p.Peers.IsValid() {
			return cone.GroupChildren * cfg.MaxChildren
		}
		return cfg.MaxChildren
	}
	if c.owned {
		return inside, nil
	}
	to, err := network.LinksTo(0, []netip.Prefix{netip.PrefixFrom(c.ext.Addr(), c.ext.Addr().BitLen())})
	if err != nil {
		return inside, err
	}
	// Subnets that are not enabled have routes as well.
	c.routed = c.routed || to[0].Name != "" && to[0].Outside == 0
	return flows.LinkOf(to[0]), nil
}

// rulesTime is how long to wait for a reconcile that is busy.
const rulesTime = 10 * time.Second

// rules returns the user's rules as read last. The reconcile owns them; a Ruleset is not
// changed once read.
func (s *shared) rules() (rs *userrules.Ruleset, err error) {
	done := make(chan struct{})
	wait, cancel := context.WithTimeout(context.Background(), rulesTime)
	defer cancel()
	select {
	case s.looks <- func(r *reconciler) { rs, err = r.firewall.user, r.firewall.unread; close(done) }:
		<-done
	case <-s.ended:
		err = errEnded
	case <-wait.Done():
		err = errors.New("the daemon is too busy")
	}
	if err == nil && rs == nil {
		err = errors.New("not read yet")
	}
	return rs, err
}
