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

	// unwanted are permissions that should no longer stand, but that the kernel failed to
	// remove. They count until it does.
	unwanted map[anchor]cone.Permission
}

func newLedger(limit int) ledger {
	return ledger{ext: make(map[anchor]cone.Addr), onPort: make(map[port]int), max: limit, unwanted: make(map[anchor]cone.Permission)}
}

// of returns the anchor of p: the one that p has, else a free one.
func (l *ledger) of(p *cone.Permission) (a anchor, stands, ok bool) {
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
	return a, r
}

// take notes that a serves the outside address ext. A dump may show the same
// anchor twice.
func (l *ledger) take(a anchor, ext cone.Addr) {
	l.release(a)
	l.ext[a] = ext
	l.onPort[l.port(a)]++
}

func (l *ledger) release(a anchor) {
	delete(l.unwanted, a)
	if _, ok := l.ext[a]; !ok {
		return
	}
	at := l.port(a)
	delete(l.ext, a)
	if l.onPort[at]--; l.onPort[at] == 0 {
		delete(l.onPort, at)
	}
}

func (l *ledger) port(a anchor) port {
	return port{cone.Endpoint{Addr: l.ext[a], Port: a.port}, a.zone}
}
