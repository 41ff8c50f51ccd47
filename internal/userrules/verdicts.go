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

// ChildVerdicts says what the user's forward hook does with the first packet of a flow that
// a peer opens to a host of a subnet.
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
	// Dropper is the first base chain that drops or rejects most packets of the DNATed
	// kind, otherwise of the RELATED kind, as in "ip filter FORWARD". It is for messages.
	Dropper string
}
