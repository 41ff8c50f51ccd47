package cone

import (
	"maps"
	"time"
)

const (
	// forwardAway is how long a forward that is gone may come back: firewall scripts flush
	// rules and add them again, one after the other.
	forwardAway = time.Minute
	// mostInterim bounds the children that are remembered, and mostFormer the forwards.
	mostInterim, mostFormer = 1024, 16
	// interimAnswer is how long the host of an ended child may still answer it.
	interimAnswer = 2 * time.Second
)

// interim holds the children that may have begun while a forward of the user's was away. They
// end when it is back, even if their hosts answered them: without conenatd the forward would
// get their packets then.
type interim struct {
	former   []formerForwards // the oldest first
	children map[int32]bool   // by flow: whether the forward was seen to be away
	ended    map[interimKey]time.Duration
}

// An interimKey names a flow of interim by its ends outside.
type interimKey struct {
	extKey
	from Endpoint
}

// formerForwards are what the user's rules forwarded until some time.
type formerForwards struct {
	rules func(Permission) Forwarding
	until time.Duration
}

// changeForwards notes that the present forwards end now.
func (x *interim) changeForwards(now time.Duration, present func(Permission) Forwarding) {
	for len(x.former) > 0 && now-x.former[0].until >= forwardAway {
		x.former = x.former[1:]
	}
	if present != nil && len(x.former) < mostFormer {
		x.former = append(x.former, formerForwards{present, now})
	}
}

// noteInterim notes that flow n is a new child, if a forward may have been away when it began.
func (m *Model) noteInterim(now time.Duration, n int32) {
	x := &m.interim
	if m.snap.showing || len(x.children) >= mostInterim { // a child in a dump may be an old one
		return
	}
	p := m.admits(n)
	for _, f := range x.former {
		if now-f.until < forwardAway && f.rules(p) == ForwardedElsewhere {
			x.children[n] = true
			return
		}
	}
	if m.rules(p) == ForwardedElsewhere {
		x.children[n] = false
	}
}

// admits returns the permission of flow n for its peer alone.
func (m *Model) admits(n int32) Permission {
	p := m.claims[m.flows.all[n].claim].Permission
	p.Peer, p.Wild = m.from(n).Addr, 0
	return p
}

// EndInterim ends the children that began while a forward was away that is back now. Call it
// each time the user's rules were read, after SetForwards. takes says where the
// rules surely lead all packets of the peer of a permission; it may be nil. Where that is elsewhere,
// a new child shows that the forward was away for a moment, even if no reading saw that.
func (m *Model) EndInterim(now time.Duration, takes func(Permission) Forwarding) {
	maps.DeleteFunc(m.interim.ended, func(_ interimKey, at time.Duration) bool { return now-at >= interimAnswer })
	for n, away := range m.interim.children {
		p := m.admits(n)
		switch back := m.rules(p) == ForwardedElsewhere; {
		case back && (away || takes != nil && takes(p) == ForwardedElsewhere):
			fl, from := &m.flows.all[n], m.from(n)
			m.op(Op{Kind: DropChild, Permission: p, From: from, FromZone: fl.zone, ID: fl.id})
			m.interim.ended[interimKey{p.extKey(), from}] = now
			delete(m.interim.children, n)
		case !back:
			m.interim.children[n] = true
		}
	}
}

// answersInterim handles f, which a host sends with p, if it is the answer to a child that
// EndInterim ended a moment ago: f would take the packets of the forward again, so it ends, too.
func (m *Model) answersInterim(now time.Duration, f *Flow, p *Permission) bool {
	at, ended := m.interim.ended[interimKey{p.extKey(), f.ReplySrc}]
	if !ended || now-at >= interimAnswer || f.Status.Has(StatusAssured) {
		return false
	}
	m.op(Op{Kind: DropChild, Permission: *p, From: f.ReplySrc, FromZone: f.ReplyZone, ID: f.ID})
	return true
}
