package userrules

// An Answer says what a firewall does with packets, as far as its rules are understood.
type Answer uint8

// The answers. Unknown also stands for packets that are treated differently.
const (
	Unknown Answer = iota
	Accepted
	Dropped
)

func (a Answer) String() string {
	switch a {
	case Accepted:
		return "accepted"
	case Dropped:
		return "dropped"
	}
	return "unknown"
}

// ChildVerdicts says what the user's chains of the prerouting and forward hooks do with the first
// packet of a flow that a peer opens to a host of a subnet.
type ChildVerdicts struct {
	// DNATed is for a child that the map admitted: the packet is NEW and its
	// destination was translated (ct state new, ct status dnat).
	DNATed Answer
	// Related is for a child of an expectation (ct state related, ct status
	// expected). To a private IPv4 subnet it is translated, too.
	Related Answer
	// MostDNATed and MostRelated are the answers for all but a few addresses
	// and ports: they leave out a rule for one host or port, or a blocklist.
	MostDNATed, MostRelated Answer
	// DNATedBy and RelatedBy are the first base chains that drop or reject most packets of a
	// kind. They are for messages.
	DNATedBy, RelatedBy Dropper
}

// A Dropper is a base chain that drops packets.
type Dropper struct {
	Chain string // as in "ip filter FORWARD"; empty if there is none
	At    Place
}

// Dropper returns the chain to change so that children get in: the one that drops the DNATed
// kind, or the RELATED kind if that one passes or has more to tell children by.
func (v ChildVerdicts) Dropper() Dropper {
	if v.DNATedBy.Chain == "" || v.RelatedBy.Chain != "" && v.DNATedBy.At != BehindNAT {
		return v.RelatedBy
	}
	return v.DNATedBy
}
