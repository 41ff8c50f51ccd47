package cone

// An OpKind says what an Op wants done.
type OpKind uint8

// The kinds of Op.
const (
	// Grant makes Permission stand by the carriers By. It may stand already; with
	// Policy.Learned the kernel may have learned its Key for another inside endpoint,
	// which it replaces. The outcome goes to Granted, Failed or Refused.
	Grant OpKind = iota
	// Revoke ends Permission as far as it stands by By. It may be gone already.
	Revoke
	// Refresh renews the kernel's own timeout of Permission, by By.
	Refresh
	// Query asks how the flow from Peer, Port to Ext fares; the answer goes
	// to FlowSeen or FlowMissing.
	Query
	// DropUnanswered deletes the child ID from Peer, Port to Ext, unless the
	// inside host answered it.
	DropUnanswered
	// DropEarly deletes the flow ID from Peer, Port to Ext that ends on the
	// gateway itself, unless a local socket serves it.
	DropEarly
	// Deny keeps Permission, which a flow wants and must not have, from
	// standing: a kernel that learns by itself must not learn its Key, and
	// what it learned already ends. A later Grant of the same Key lifts the
	// denial, and so does a timeout of its own. While the denial holds, it is
	// renewed every Policy.Retry. By is ByMap with Policy.Learned; without, there is
	// a Deny only of what the user revoked, for the next daemon (Model.Revoked).
	Deny
)

func (k OpKind) String() string {
	return [...]string{"grant", "revoke", "refresh", "query", "drop unanswered", "drop early", "deny"}[k]
}

// An Op is one decision of the model, to be carried out in order.
type Op struct {
	Permission
	ID   uint32   // of the flow, for Query, DropUnanswered, DropEarly
	From Endpoint // the peer's, for the same
	// FromZone is the conntrack zone of the packets from there, for the same.
	FromZone uint16
	Kind     OpKind
	By       Carriers // for Grant, Revoke, Refresh and Deny
	Reason   Reason   // why, for Revoke and Deny
}

// FlowTuple returns the endpoints of the flow that a Query, DropUnanswered or
// DropEarly means, as packets arrive from outside.
func (o *Op) FlowTuple() (src, dst Endpoint) {
	return o.From, o.Ext
}

func (m *Model) op(o Op) { m.ops = append(m.ops, o) }

// Ops returns what was decided since the last call, in order. The slice is
// valid until the next call of Ops; the outcome of an Op may be told to m while
// the slice is worked off.
func (m *Model) Ops() []Op {
	ops := m.ops
	m.ops, m.spare = m.spare[:0], ops
	return ops
}
