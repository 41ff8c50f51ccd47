package cone

// An EventKind says what an Event tells.
type EventKind uint8

// The kinds of Event.
const (
	EventGranted   EventKind = iota // the kernel carries the permission, by By
	EventRefused                    // it does not stand for now, for Reason; told once for each time that it is claimed
	EventRevoked                    // it ends, for Reason
	EventChild                      // the peer opened a flow from From
	EventChildGone                  // that flow is gone
)

func (k EventKind) String() string {
	return [...]string{"granted", "refused", "revoked", "child", "child_gone"}[k]
}

// An Event is something that happened to a permission.
type Event struct {
	Permission
	From   Endpoint // of a child, on the peer's side
	Kind   EventKind
	By     Carriers
	Reason Reason
}

// Observe calls f with each event from now on. f must return at once, and must not call
// methods of m.
func (m *Model) Observe(f func(Event)) { m.observer = f }

func (m *Model) observe(e Event) {
	if m.observer != nil {
		m.observer(e)
	}
}

// observeChild tells of a flow of claim i if it is a child.
func (m *Model) observeChild(k EventKind, i int32, from Endpoint, child bool) {
	if child && m.observer != nil {
		c := &m.claims[i]
		m.observer(Event{Kind: k, Permission: c.Permission, By: c.placed.By, From: from})
	}
}
