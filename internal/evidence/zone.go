package evidence

import "time"

// zoneQuiet is how long no packet must have come in a zone before a child of an expectation shows
// that packets do not come there any more. It is so long because with several uplinks those of one
// may come in a zone and those of another not.
const zoneQuiet = time.Minute

// An InZone tells of packets from outside that come in a conntrack zone without expectations: these
// stand in the zone of the flow's reply direction.
type InZone struct {
	Packets  Count         // such packets
	before   uint64        // Packets at the last look
	seen     time.Duration // when they last grew
	expected uint64        // children of expectations until then
	Lately   bool          // packets came lately; set by Note
}

// Note looks at Packets. expected is how many children expectations have admitted so far, and
// oneDirection whether zones are given to the original direction alone. If nobody sends, Lately
// holds for Memory.
func (z *InZone) Note(now time.Duration, oneDirection bool, expected uint64) {
	if z.Packets.Total > z.before {
		z.before, z.seen, z.expected, z.Lately = z.Packets.Total, now, expected, true
	}
	over := now-z.seen >= Memory || now-z.seen >= zoneQuiet && expected > z.expected
	z.Lately = z.Lately && oneDirection && !over
}
