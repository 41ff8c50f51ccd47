package engine

import (
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

func (w *world) peer() cone.Endpoint {
	return cone.EndpointFrom(netip.MustParseAddrPort(fmt.Sprintf("203.0.113.%d:%d", 5+w.rnd.IntN(3), []int{53, 5060, 5070}[w.rnd.IntN(3)])))
}

func (w *world) ext() cone.Endpoint {
	return cone.Endpoint{Addr: extAddr, Port: 3074 + uint16(w.rnd.IntN(2))}
}

func (w *world) host() cone.Endpoint {
	return cone.EndpointFrom(netip.MustParseAddrPort(fmt.Sprintf("10.47.11.%d:3074", 109+w.rnd.IntN(3))))
}

// open lets an inside host send to a peer, by a new flow.
func (w *world) open() {
	in, peer, ext := w.host(), w.peer(), w.ext()
	for _, f := range w.k.flows { // the kernel has each tuple once
		if f.Src == in && f.Dst == peer || f.ReplySrc == peer && f.ReplyDst == ext || f.Src == peer && f.Dst == ext || f.ReplySrc == in && f.ReplyDst == peer {
			return
		}
	}
	if w.overrun && w.revoked[in] {
		w.reconcile() // else it is taken for an older flow
	}
	w.notef("new %v->%v from %v", in, peer, ext)
	f := w.k.add(cone.Flow{Status: cone.StatusSrcNAT | cone.StatusConfirmed, Src: in, Dst: peer, ReplySrc: peer, ReplyDst: ext})
	if !slices.Contains(w.policy.ExcludePeerPorts, peer.Port) {
		for _, g := range w.k.flows { // it ends the revocation of what it gives
			p := w.permission(f)
			if q := w.permission(g); *p == *q {
				g.revoked = false
			}
		}
	}
	w.send(f)
	w.event(f, false)
}

// related reports whether a contact with one peer may permit the other.
func (w *world) related(in cone.Endpoint, a, b cone.Addr) bool {
	group := groupOf.Peers()
	return group.Contains(a.Netip()) && group.Contains(b.Netip()) || in.Addr.Netip() == netip.MustParseAddr("10.47.11.110")
}

// send lets the inside host of an outbound flow send a packet.
func (w *world) send(f *fakeFlow) {
	f.last, f.sent = w.now, w.now
	w.noteSent(f, f.sent)
	if slices.Contains(w.policy.ExcludePeerPorts, f.ReplySrc.Port) {
		return
	}
	p := w.permission(f)
	if w.policy.Learned && !f.Status.Has(cone.StatusSeenReply) && w.k.learn(p, w.policy.Lifetime) && f.OrigPackets > 1 {
		w.disturbed = true // no event tells of it
	}
}

// noteSent notes a packet from inside of a flow.
func (w *world) noteSent(f *fakeFlow, at time.Duration) {
	c := contact{f.Src, f.ReplyDst, f.ReplySrc.Addr}
	if !f.Status.Has(cone.StatusSrcNAT) {
		c = contact{f.ReplySrc, f.Dst, f.Src.Addr}
	}
	if !f.revoked || w.supported(f) {
		w.sent[c] = max(w.sent[c], at)
	}
}

// supported reports whether f is a child whose host has another flow, not revoked, that lets its
// peer in: then it refreshes that permission, though it was there when an earlier one was revoked.
func (w *world) supported(f *fakeFlow) bool {
	return !f.Status.Has(cone.StatusSrcNAT) && slices.ContainsFunc(w.k.flows, func(g *fakeFlow) bool {
		return !g.revoked && g.Src == f.ReplySrc && g.ReplyDst == f.Dst && !slices.Contains(w.policy.ExcludePeerPorts, g.ReplySrc.Port) &&
			(g.ReplySrc.Addr == f.Src.Addr || w.related(g.Src, g.ReplySrc.Addr, f.Src.Addr))
	})
}

// permission returns what the map permits for the contact of an outbound flow.
func (w *world) permission(f *fakeFlow) *cone.Permission {
	p := &cone.Permission{Key: cone.Key{Ext: f.ReplyDst, Peer: f.ReplySrc.Addr}, Int: f.Src}
	for _, s := range w.policy.Subnets {
		if !s.Prefix.Contains(f.Src.Addr.Netip()) {
			continue
		}
		if s.Filtering == cone.EndpointIndependent {
			p.HostBits = 32
		} else if len(w.policy.PeerGroups) > 0 && groupOf.Peers().Contains(p.Peer.Netip()) && w.policy.Mapped {
			p.HostBits = groupOf.HostBits
		}
		break
	}
	p.Peer = p.Peer.WithoutLow(p.HostBits)
	return p
}

// packet passes a packet of an existing flow.
func (w *world) packet() {
	if len(w.k.flows) == 0 {
		return
	}
	f := w.k.flows[w.rnd.IntN(len(w.k.flows))]
	out := f.Status.Has(cone.StatusSrcNAT)
	fromInside := w.rnd.IntN(2) == 0
	w.notef("packet of %v->%v, from inside: %v", f.Src, f.Dst, fromInside)
	f.last = w.now
	switch {
	case out && fromInside:
		f.OrigPackets++
		w.send(f)
	case out:
		f.ReplyPackets++
		f.Status |= cone.StatusSeenReply
		w.noteSent(f, w.now)
	case fromInside:
		f.ReplyPackets++
		f.Status |= cone.StatusSeenReply
		f.sent = w.now
		w.noteSent(f, f.sent)
	default:
		f.OrigPackets++
		if f.Status.Has(cone.StatusSeenReply) {
			w.noteSent(f, w.now)
		}
	}
}

// receive lets somebody outside send to one of our outside endpoints.
func (w *world) receive() {
	from, ext := w.peer(), w.ext()
	if w.rnd.IntN(4) == 0 {
		from = stander
	}
	for _, f := range w.k.flows {
		if f.Src == from && f.Dst == ext || f.ReplySrc == from && f.ReplyDst == ext {
			return
		}
	}
	f, by := w.k.receive(from, ext)
	if f == nil {
		w.notef("%v sends to %v, and is dropped", from, ext)
		return
	}
	w.notef("%v sends to %v: by %v, to %v", from, ext, by, f.ReplySrc)
	if by != 0 {
		w.wantJustified(f.ReplySrc, from.Addr, ext)
	}
	w.event(f, false)
}

// wantJustified fails if a peer may reach an inside host that did not ask for it.
func (w *world) wantJustified(in cone.Endpoint, peer cone.Addr, ext cone.Endpoint) {
	w.t.Helper()
	if w.disturbed {
		return
	}
	if slices.ContainsFunc(w.k.flows, func(f *fakeFlow) bool { // revoked for one peer alone of its group
		return f.Src == in && f.ReplyDst == ext && f.ReplySrc.Addr != peer && w.related(in, f.ReplySrc.Addr, peer)
	}) {
		return
	}
	for c, at := range w.sent {
		if c.in == in && c.ext == ext && w.now-at <= standsAtMost && (c.peer == peer || w.related(in, c.peer, peer)) {
			return
		}
	}
	w.failf("%v is let in at %v to %v, which did not send to it", peer, ext, in)
}

// meddle lets somebody else change what we have in the kernel.
func (w *world) meddle() {
	w.disturbed = true
	xs, es := sortedKeys(w.k.expectations), sortedKeys(w.k.elements)
	switch what := w.rnd.IntN(7); {
	case what < 3 && len(xs) > 0:
		key := xs[w.rnd.IntN(len(xs))]
		x := w.k.expectations[key]
		w.notef("theft %d of expectation %v", what, key)
		delete(w.k.expectations, key)
		switch {
		case what == 1 && x.ours():
			w.k.deleteAnchor(x.master)
			w.event(&fakeFlow{Flow: cone.Flow{Src: cone.Endpoint{Addr: x.master.in}, Dst: cone.Endpoint{Addr: x.master.peer, Port: x.master.port}}}, true)
		case what == 2:
			w.k.expectations[key] = &expectation{in: x.in, until: w.now + lifetime}
		}
	case what == 3 && len(es) > 0:
		key := es[w.rnd.IntN(len(es))]
		w.notef("theft of element %v", key)
		delete(w.k.elements, key)
	case what == 4 && len(es) > 0:
		key := es[w.rnd.IntN(len(es))]
		in := w.host()
		w.notef("element %v leads to %v now", key, in)
		w.k.elements[key] = &element{in: in, until: w.k.elements[key].until}
		w.foisted = true
	case what == 5 && w.policy.Mapped:
		key := cone.Key{Ext: w.ext(), Peer: w.peer().Addr}
		if w.k.elements[key] == nil && len(w.k.elements) < w.k.mapSize {
			w.notef("somebody adds element %v", key)
			w.k.elements[key] = &element{in: w.host(), until: w.now + time.Duration(5+w.rnd.IntN(10))*lifetime}
			w.foisted = true
		}
	case what == 6 && w.policy.Mapped:
		w.notef("flush ruleset")
		w.k.table = false
		clear(w.k.elements)
		clear(w.k.denied)
		clear(w.k.full)
	}
}

func (w *world) reload() {
	if w.policy.Lifetime < lifetime {
		w.wasShort = w.now
	}
	w.policy = w.policies[w.rnd.IntN(len(w.policies))]
	w.notef("reload: lifetime %v, limits %v, groups %v, no peer ports %v, %v", w.policy.Lifetime, w.policy.Limits, w.policy.PeerGroups, w.policy.ExcludePeerPorts, w.policy.Subnets)
	for _, f := range w.k.flows {
		// A flow that gives nothing now may lose its revocation, and so may one that gives now
		// what another flow gives.
		p := w.permission(f)
		if f.revoked && (slices.Contains(w.policy.ExcludePeerPorts, f.ReplySrc.Port) || slices.ContainsFunc(w.k.flows, func(g *fakeFlow) bool {
			q := w.permission(g)
			return !g.revoked && *p == *q
		})) {
			f.revoked = false
			w.noteSent(f, f.last)
		}
	}
	w.e.Kernel.SetLifetime(w.policy.Lifetime)
	if m, ok := w.e.Kernel.Map.(*fakeMap); ok {
		m.groups = groups(w.policy)
	}
	w.e.Model.SetPolicy(w.now, w.policy)
	w.apply()
	w.reconcile()
}

func (w *world) restart() {
	w.notef("kill")
	w.overrun = true
	w.age(time.Duration(w.rnd.IntN(90)) * time.Second)
	w.notef("start")
	w.start()
}

func (w *world) revoke() {
	if w.overrun {
		w.reconcile() // nothing is known of the flows whose events were lost
	}
	in := w.host()
	w.notef("revoke %v", in)
	w.revoked[in] = true
	views := w.views()
	w.e.Model.Revoke(w.now, func(p cone.Permission) bool { return p.Int == in })
	for c := range w.sent {
		if c.in == in {
			delete(w.sent, c)
		}
	}
	for _, f := range w.k.flows {
		// The flows that hold a permission now do not bring it back.
		holds := f.Src == in && !slices.Contains(w.policy.ExcludePeerPorts, f.ReplySrc.Port) && slices.ContainsFunc(views, func(v cone.View) bool {
			return v.Int == in && v.Ext == f.ReplyDst && v.Peers().Contains(f.ReplySrc.Addr.Netip())
		})
		f.revoked = f.revoked || f.ReplySrc == in || holds
		w.noteSent(f, f.last)
	}
	w.apply()
}

func (w *world) step() {
	toggle := func(m map[cone.Endpoint]bool, ext cone.Endpoint) {
		if m[ext] = !m[ext]; !m[ext] {
			delete(m, ext)
		}
	}
	switch n := w.rnd.IntN(100); {
	case n < 25:
		w.open()
	case n < 45:
		w.packet()
	case n < 58:
		w.receive()
	case n < 64:
		if len(w.k.flows) > 0 {
			w.gone(w.rnd.IntN(len(w.k.flows)))
		}
	case n < 74:
		w.pass(time.Duration(w.rnd.IntN(20)) * time.Second)
	case n < 76:
		d := time.Duration(w.rnd.IntN(200)) * time.Second
		if w.rnd.IntN(2) == 0 {
			w.notef("the daemon is stopped for %v", d)
			w.age(d)
			w.disturbed = true // what has run out is found by its next renewal
			w.tick()
		} else {
			w.pass(d)
		}
	case n < 81:
		w.meddle()
	case n < 83:
		w.restart()
	case n < 85:
		w.reload()
	case n < 86:
		w.notef("requests fail, and lists miss something")
		w.k.failing, w.k.fickle, w.disturbed, w.failed = 30, 30, true, true
	case n < 88:
		w.notef("overrun")
		w.overrun, w.disturbed = true, true
	case n < 89:
		ext := w.ext()
		toggle(w.k.sockets, ext)
		w.notef("socket at %v: %v", ext, w.k.sockets[ext])
		w.lookAtSockets()
	case n < 90:
		ext := w.ext()
		if _, is := w.k.forwards[ext]; is {
			delete(w.k.forwards, ext)
		} else {
			to := cone.EndpointFrom(netip.MustParseAddrPort("10.47.12.5:80"))
			if w.rnd.IntN(2) == 0 { // or where a permission leads
				for _, v := range w.views() {
					if v.Ext == ext {
						to = v.Int
					}
				}
			}
			w.k.forwards[ext] = to
		}
		w.notef("forwards: %v", w.k.forwards)
		w.e.Model.SetForwards(w.now, w.forwarded, true)
		w.apply()
	case n < 91:
		w.revoke()
	case n < 92:
		size := func() int { return []int{3, 1000}[w.rnd.IntN(2)] }
		w.k.mapSize, w.k.expectMax, w.k.anchorMax = max(size(), len(w.k.elements)), size(), size()
		w.notef("map of %d, %d expectations, %d anchors", w.k.mapSize, w.k.expectMax, w.k.anchorMax)
	case n < 95:
		w.notef("reconcile")
		w.reconcile()
	default:
		w.rest()
	}
	w.check()
}
