package cone

import (
	"maps"
	"time"
)

// A forward of the user's gets the packets that match it, but not those of flows that are
// older: conntrack translates a flow as it did when the flow began. So children end that
// conenatd admitted while the forward was not there, in two cases. The forward is new: the
// unanswered ones end (forwardBegan, isOlder); the others are conversations that the user
// let begin. Or it was away for a moment and is back: then all that began meanwhile end
// (EndInterim), because without conenatd the forward would get their packets.

const (
	// forwardAway is how long a forward that is gone may come back: firewall scripts flush
	// rules and add them again, one after the other.
	forwardAway = time.Minute
	// mostInterim bounds the children that are remembered, and mostEndedForwards the forwards.
	mostInterim, mostEndedForwards = 1024, 16
	// eventsLate is how long events may still report what began before something else that
	// is known already: a child that is older than its forward, or its host's answer.
	eventsLate = 2 * time.Second
)

// olderChildren holds what is known of children that are older than a forward.
type olderChildren struct {
	begun     map[extKey]struct{} // endpoints whose forward was noticed within eventsLate
	begunEnds time.Duration       // when begun expires

	endedForwards []endedForwards // the oldest first
	interim       map[int32]bool  // by flow, children that may have begun meanwhile: whether the forward was seen to be away
	ended         map[interimKey]time.Duration
}

func newOlderChildren() olderChildren {
	return olderChildren{begun: make(map[extKey]struct{}), interim: make(map[int32]bool), ended: make(map[interimKey]time.Duration)}
}

// An interimKey is the two outside endpoints, of the peer and of the gateway, of a child that has ended.
type interimKey struct {
	extKey
	from Endpoint
}

// endedForwards are what the user's rules forwarded until some time.
type endedForwards struct {
	rules func(Permission) Forwarding
	until time.Duration
}

// forwardBegan notes that a forward now covers the outside endpoint of claim i, which
// stands. It drops the unanswered children that were admitted before, so that their next
// packets are translated anew.
func (m *Model) forwardBegan(now time.Duration, i int32) {
	c, x := &m.claims[i], &m.older
	m.dropChildren(c)
	if now >= x.begunEnds {
		clear(x.begun)
	}
	x.begun[c.extKey()] = struct{}{}
	x.begunEnds = now + eventsLate
}

// isOlder reports whether f, a new unanswered child of c, may have been admitted before the
// forward that its packets belong to. A child of an expectation always was. One that a dump shows
// first may be of any age: no daemon ran when it began, or its event was lost.
func (m *Model) isOlder(now time.Duration, f *Flow, c *claim) bool {
	if !c.placed.Why.isForward() || f.Status.Has(StatusSeenReply) {
		return false
	}
	_, begun := m.older.begun[c.extKey()]
	return f.Status.Has(StatusExpected) || m.snap.fromDump || begun && now < m.older.begunEnds
}

// changeForwards notes that the present forwards end now.
func (x *olderChildren) changeForwards(now time.Duration, present func(Permission) Forwarding) {
	for len(x.endedForwards) > 0 && now-x.endedForwards[0].until >= forwardAway {
		x.endedForwards = x.endedForwards[1:]
	}
	if present != nil && len(x.endedForwards) < mostEndedForwards {
		x.endedForwards = append(x.endedForwards, endedForwards{present, now})
	}
}

// noteInterim notes that flow n is a new child, if a forward may have been away when it began.
func (m *Model) noteInterim(now time.Duration, n int32) {
	x := &m.older
	if m.snap.fromDump || len(x.interim) >= mostInterim { // a child in a dump may be an old one
		return
	}
	p := m.singlePermission(n)
	for _, f := range x.endedForwards {
		if now-f.until < forwardAway && f.rules(p) >= ForwardedElsewhere {
			x.interim[n] = true
			return
		}
	}
	if m.forwarding(p) >= ForwardedElsewhere {
		x.interim[n] = false
	}
}

// singlePermission returns the permission of flow n for its peer alone.
func (m *Model) singlePermission(n int32) Permission {
	p := m.claims[m.flows.all[n].claim].Permission
	p.Peer, p.HostBits = m.from(n).Addr, 0
	return p
}

// EndInterim ends the children that began while a forward was away that is back now. Call it
// each time the user's rules were read, after SetForwards. takes says where the
// rules surely lead all packets of the peer of a permission; it may be nil. Where that is elsewhere,
// a new child shows that the forward was away for a moment, even if no reading saw that.
func (m *Model) EndInterim(now time.Duration, takes func(Permission) Forwarding) {
	x := &m.older
	maps.DeleteFunc(x.ended, func(_ interimKey, at time.Duration) bool { return now-at >= eventsLate })
	for n, away := range x.interim {
		p := m.singlePermission(n)
		switch back := m.forwarding(p) >= ForwardedElsewhere; {
		case back && (away || takes != nil && takes(p) >= ForwardedElsewhere):
			fl, from := &m.flows.all[n], m.from(n)
			m.op(Op{Kind: DropChild, Permission: p, From: from, FromZone: fl.zone, ID: fl.id})
			x.ended[interimKey{p.extKey(), from}] = now
			delete(x.interim, n)
		case !back:
			x.interim[n] = true
		}
	}
}

// answersInterim handles f, which a host sends with p, if it is the answer to a child that
// EndInterim ended a moment ago: f would take the packets of the forward again, so it ends, too.
func (m *Model) answersInterim(now time.Duration, f *Flow, p *Permission) bool {
	at, ended := m.older.ended[interimKey{p.extKey(), f.ReplySrc}]
	if !ended || now-at >= eventsLate || f.Status.Has(StatusAssured) {
		return false
	}
	m.op(Op{Kind: DropChild, Permission: *p, From: f.ReplySrc, FromZone: f.ReplyZone, ID: f.ID})
	return true
}

// AwaitsAnswers reports whether such an answer may begin a flow now. The kernel must report it:
// until it ends, the forward gets no packet.
func (m *Model) AwaitsAnswers(now time.Duration) bool {
	for _, at := range m.older.ended {
		if now-at < eventsLate {
			return true
		}
	}
	return false
}
