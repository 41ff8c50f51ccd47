package ctwatch

import (
	"encoding/binary"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A Table says how full the conntrack table is.
type Table struct {
	// Entries counts those of this network namespace, of all protocols, including those
	// that timed out and were not collected yet.
	Entries int
	// Max is how many there may be (nf_conntrack_max); 0 means no bound.
	Max int
}

// Table asks how full the table is (ctnetlink_stat_ct). It costs one query, however
// large the table is.
func (q *Queries) Table() (t Table, err error) {
	var bad error
	err = q.query(ipctnlMsgCTGetStats, netlink.Acknowledge, unix.AF_UNSPEC, nil, func(_ header, msg []byte) {
		t, bad = parseTable(msg)
	})
	if err == nil {
		err = bad
	}
	if err != nil {
		return Table{}, wrap("ask how full conntrack is", err)
	}
	return t, nil
}

func parseTable(msg []byte) (t Table, err error) {
	if len(msg) < nfgenmsgLen {
		return t, errMalformed
	}
	for b := msg[nfgenmsgLen:]; len(b) > 0; {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return t, errMalformed
		}
		b = rest
		var field *int
		switch typ {
		case ctaStatsGlobalEntries:
			field = &t.Entries
		case ctaStatsGlobalMaxEntries:
			field = &t.Max
		default:
			continue
		}
		if len(val) != 4 {
			return t, errMalformed
		}
		*field = int(binary.BigEndian.Uint32(val))
	}
	return t, nil
}
