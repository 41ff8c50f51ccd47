package expect

import "github.com/conenatd/conenatd/internal/cone"

// An anchor names the conntrack entry that an expectation hangs on: inside
// address to peer, since nat-follow-master reads these, with the outside port
// on one side and port 0 on the other.
//
// With two uplinks an inside endpoint may have the same outside port on both
// outside addresses towards one peer. Then the second anchor has its ports
// flipped.
type anchor struct {
	in, peer cone.Addr
	port     uint16
	zone     uint16
	flipped  bool
}

func anchorOf(p *cone.Permission, flipped bool) anchor {
	return anchor{in: p.Int.Addr, peer: p.Peer, port: p.Ext.Port, zone: p.Zone, flipped: flipped}
}

// anchorAt is the anchor with this original direction; see cone.IsAnchor.
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

// anchors are those that stand, each with the outside address it serves.
type anchors map[anchor]cone.Addr

// of returns the anchor of p: the one that it has, else a free one.
func (s anchors) of(p *cone.Permission) (a anchor, stands, ok bool) {
	plain, flipped := anchorOf(p, false), anchorOf(p, true)
	plainExt, plainTaken := s[plain]
	flippedExt, flippedTaken := s[flipped]
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
