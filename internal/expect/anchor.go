package expect

import "github.com/conenatd/conenatd/internal/cone"

// An anchor names the conntrack entry that an expectation hangs on. It goes from the inside
// address to the peer, since nat-follow-master reads these, with the outside port on one
// side and port 0 on the other.
//
// With two uplinks an inside endpoint may use the same outside port on both outside
// addresses towards one peer. Then the second anchor has its ports flipped.
type anchor struct {
	in, peer cone.Addr
	port     uint16
	zone     uint16
	flipped  bool
}

func anchorOf(p *cone.Permission, flipped bool) anchor {
	return anchor{in: p.Int.Addr, peer: p.Peer, port: p.Ext.Port, zone: p.Zone, flipped: flipped}
}

// anchorAt returns the anchor with this original direction; see cone.IsAnchor.
func anchorAt(src, dst cone.Endpoint, zone uint16) anchor {
	return anchor{
		in: src.Addr, peer: dst.Addr, port: src.Port | dst.Port, zone: zone,
		flipped: src.Port != 0,
	}
}

// endpoints returns the original direction of the entry.
func (a anchor) endpoints() (src, dst cone.Endpoint) {
	src, dst = cone.Endpoint{Addr: a.in}, cone.Endpoint{Addr: a.peer}
	if a.flipped {
		src.Port = a.port
	} else {
		dst.Port = a.port
	}
	return src, dst
}

type port struct {
	ext  cone.Endpoint
	zone uint16
}

// A ledger records what stands, as far as needed to address it and to enforce the limits.
type ledger struct {
	ext    map[anchor]cone.Addr // outside address that each anchor serves
	onPort map[port]int
	max    int
	// related are the anchors of expectations that translate nothing because a map does. The inside
	// host that made one may have passed its Key on.
	related map[tuple]anchor

	// unwanted are permissions that should no longer stand, but that the kernel failed to
	// remove. They count until it does.
	unwanted map[anchor]cone.Permission
}

// A tuple is what an expectation of ours is known by in the kernel.
type tuple struct {
	port
	peer cone.Addr
}

func tupleOf(k *cone.Key) tuple { return tuple{port{k.Ext, k.Zone}, k.Peer} }

func newLedger(limit int) ledger {
	return ledger{
		ext: make(map[anchor]cone.Addr), onPort: make(map[port]int), max: limit,
		related: make(map[tuple]anchor), unwanted: make(map[anchor]cone.Permission),
	}
}

// of returns the anchor of p: the one that p has, else a free one.
func (l *ledger) of(p *cone.Permission) (a anchor, stands, ok bool) {
	if a, ok := l.related[tupleOf(&p.Key)]; ok && p.MapTranslates {
		return a, true, true
	}
	plain, flipped := anchorOf(p, false), anchorOf(p, true)
	plainExt, plainTaken := l.ext[plain]
	flippedExt, flippedTaken := l.ext[flipped]
	switch {
	case plainTaken && plainExt == p.Ext.Addr:
		return plain, true, true
	case flippedTaken && flippedExt == p.Ext.Addr:
		return flipped, true, true
	case !plainTaken:
		return plain, false, true
	case !flippedTaken:
		return flipped, false, true
	}
	return anchor{}, false, false
}

// place returns the anchor of p, or why it cannot have one.
func (l *ledger) place(p *cone.Permission) (a anchor, stands bool, r cone.Reason) {
	a, stands, ok := l.of(p)
	switch {
	case !ok:
		r = cone.ReasonTaken
	case stands:
	case l.onPort[port{p.Ext, p.Zone}] >= maxPeersOnPort:
		r = cone.ReasonPeersOnPort
	case len(l.ext) >= l.max:
		r = cone.ReasonTableFull
	}
	return a, stands, r
}

// reserve finds the anchor of p and takes it if the limits allow.
func (l *ledger) reserve(p *cone.Permission) (anchor, cone.Reason) {
	a, stands, r := l.place(p)
	delete(l.unwanted, a)
	if r == cone.ReasonNone && !stands { // take without its release: a is known to be free
		l.ext[a] = p.Ext.Addr
		l.onPort[port{p.Ext, p.Zone}]++
	}
	if r == cone.ReasonNone {
		l.relate(p, a)
	}
	return a, r
}

// relate notes whether a map translates what p, on a, lets in.
func (l *ledger) relate(p *cone.Permission, a anchor) {
	if p.MapTranslates {
		l.related[tupleOf(&p.Key)] = a
	} else {
		delete(l.related, tupleOf(&p.Key))
	}
}

// take notes that p stands on a. A dump may show the same anchor twice.
func (l *ledger) take(a anchor, p *cone.Permission) {
	l.release(a)
	l.ext[a] = p.Ext.Addr
	l.onPort[l.port(a)]++
	l.relate(p, a)
}

func (l *ledger) release(a anchor) {
	delete(l.unwanted, a)
	if _, ok := l.ext[a]; !ok {
		return
	}
	at := l.port(a)
	if t := (tuple{at, a.peer}); l.related[t] == a {
		delete(l.related, t)
	}
	delete(l.ext, a)
	if l.onPort[at]--; l.onPort[at] == 0 {
		delete(l.onPort, at)
	}
}

func (l *ledger) port(a anchor) port {
	return port{cone.Endpoint{Addr: l.ext[a], Port: a.port}, a.zone}
}
