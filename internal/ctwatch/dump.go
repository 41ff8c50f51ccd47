package ctwatch

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Dump calls fn for each UDP entry of the table, both families, all zones, without anchors
// and others with port 0 (ctnetlink_dump_table). The Flow is the same one each time: fn must copy what it keeps,
// and must not use q.
//
// The table changes during the dump: an entry that is made or deleted meanwhile may be
// shown or not. After an error entries are missing, but those that fn got are true.
// nfnl.ErrInterrupted says that the dump nevertheless ran to its end.
func (q *Queries) Dump(fn func(*cone.Flow)) error {
	var f cone.Flow
	var interrupted bool
	var malformed int
	each := func(body []byte) {
		switch err := parseFlow(body, &f); {
		case err == nil && !hasPortZero(&f):
			fn(&f)
		case errors.Is(err, errMalformed):
			malformed++
		}
	}

	// The kernel accepts a filter by protocol for one family only. Two walks through the
	// table cost less than TCP entries that nobody reads.
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		switch err := q.dumpFamily(family, each); {
		case errors.Is(err, nfnl.ErrInterrupted):
			interrupted = true
		case err != nil:
			return wrap("dump conntrack table", err)
		}
	}
	switch {
	case malformed > 0:
		return fmt.Errorf("dump conntrack table: %d entries: %w", malformed, errMalformed)
	case interrupted:
		return wrap("dump conntrack table", nfnl.ErrInterrupted)
	}
	return nil
}

func (q *Queries) dumpFamily(family uint8, each func(body []byte)) error {
	if !q.noFilter {
		err := q.query(ipctnlMsgCTGet, unix.NLM_F_DUMP, family, onlyUDP, each)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		// The kernel checks the filter before it writes the first entry, so
		// each was not called.
		q.noFilter = true
	}
	return q.query(ipctnlMsgCTGet, unix.NLM_F_DUMP, family, nil, each)
}

// onlyUDP appends a filter for UDP (CTA_FILTER, since Linux 5.8). An older kernel skips the
// unknown attribute and sends all protocols; the parser drops the others.
func onlyUDP(e *nfnl.Encoder) {
	tuple := e.Nest(nfnl.CTATupleOrig)
	proto := e.Nest(nfnl.CTATupleProto)
	e.U8(nfnl.CTAProtoNum, unix.IPPROTO_UDP)
	e.EndNest(proto)
	e.EndNest(tuple)
	filter := e.Nest(nfnl.CTAFilter)
	e.NE32(ctaFilterOrigFlags, ctaFilterProtoNum)
	e.EndNest(filter)
}
