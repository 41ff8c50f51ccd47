package cone

// An OpKind says what an Op wants done.
type OpKind uint8

// The kinds of Op.
const (
	// Grant makes Permission stand by the carriers By. It may stand already. With
	// Policy.Learned the kernel may have learned its Key for another inside endpoint; the
	// grant replaces that element. The outcome goes to Granted, Failed or Refused.
	Grant OpKind = iota
	// Revoke ends Permission as far as it stands by By. It may be gone already.
	Revoke
	// Renew renews the kernel's own timeout of Permission, by By.
	Renew
	// Query looks up the flow from Peer, Port to Ext; the answer goes to FlowSeen or
	// FlowMissing.
	Query
	// DropUnanswered deletes the child ID from Peer, Port to Ext, unless the
	// inside host answered it.
	DropUnanswered
	// DropChild deletes it even if the host answered.
	DropChild
	// DropEarly deletes the flow ID from Peer, Port to Ext that ends on the
	// gateway itself, unless a local socket serves it.
	DropEarly
	// Deny keeps Permission, which a flow asks for, from standing: a kernel that learns by
	// itself must not learn its Key, and an element that it has learned already ends. A
	// later Grant of the same Key lifts the denial; otherwise it times out, and the model
	// renews it every Policy.Retry while its reason holds. By is ByMap with Policy.Learned.
	// Without Learned, only what the user revoked is denied, for the next daemon
	// (Model.Revoked).
	Deny
)

func (k OpKind) String() string {
	return [...]string{"grant", "revoke", "renew", "query", "drop unanswered", "drop child", "drop early", "deny"}[k]
}

// An Op is one decision of the model, to be carried out in order.
type Op struct {
	Permission
	ID   uint32   // the flow's, for Query, DropUnanswered, DropChild and DropEarly
	From Endpoint // the flow's endpoint on the peer's side, for the same kinds
	// FromZone is the conntrack zone of packets from From, for the same kinds.
	FromZone uint16
	Kind     OpKind
	By       Carriers // for Grant, Revoke, Renew and Deny
	Reason   Reason   // why, for Revoke and Deny
}

// FlowTuple returns the endpoints of the flow that a Query, DropUnanswered,
// DropChild or DropEarly means, as packets arrive from outside.
func (o *Op) FlowTuple() (src, dst Endpoint) {
	return o.From, o.Ext
}

func (m *Model) op(o Op) { m.ops = append(m.ops, o) }

// Ops returns the decisions since the last call, in order. The slice is valid until the
// next call of Ops; the caller may report the outcome of an Op to m while it works through
// the slice.
func (m *Model) Ops() []Op {
	ops := m.ops
	m.ops, m.spare = m.spare[:0], ops
	return ops
}
