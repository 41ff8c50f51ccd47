package ctwatch

import (
	"cmp"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
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
	err = q.query(ipctnlMsgCTGetStats, 0, unix.AF_UNSPEC, nil, func(body []byte) {
		t, bad = parseTable(body)
	})
	if err = cmp.Or(err, bad); err != nil {
		return Table{}, wrap("ask how full conntrack is", err)
	}
	return t, nil
}

func parseTable(msg []byte) (t Table, err error) {
	if len(msg) < nfnl.FamilyHeaderLen {
		return t, errMalformed
	}
	ok := nfnl.EachAttribute(msg[nfnl.FamilyHeaderLen:], func(typ uint16, val []byte) bool {
		v, ok := nfnl.BE32(val)
		switch typ {
		case ctaStatsGlobalEntries:
			t.Entries = int(v)
		case ctaStatsGlobalMaxEntries:
			t.Max = int(v)
		default:
			return true
		}
		return ok
	})
	if !ok {
		err = errMalformed
	}
	return t, err
}
