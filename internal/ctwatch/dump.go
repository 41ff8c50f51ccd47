package ctwatch

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Dump calls fn for each UDP entry of the table, both families, all zones, without anchors
// (ctnetlink_dump_table). The Flow is the same one each time: fn must copy what it keeps,
// and must not use q.
//
// The table changes during the dump: an entry that is made or deleted meanwhile may be
// shown or not. After an error entries are missing, but those that fn got are true.
// ErrInterrupted says that the dump nevertheless ran to its end.
func (q *Queries) Dump(fn func(*cone.Flow)) error {
	var f cone.Flow
	var interrupted bool
	var malformed int
	each := func(h header, msg []byte) {
		interrupted = interrupted || h.flags&unix.NLM_F_DUMP_INTR != 0
		switch err := parseFlow(msg, &f); {
		case err == nil && !isAnchor(&f):
			fn(&f)
		case errors.Is(err, errMalformed):
			malformed++
		}
	}

	// The kernel accepts a filter by protocol for one family only. Two walks through the
	// table cost less than TCP entries that nobody reads.
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		if err := q.dumpFamily(family, each); err != nil {
			return wrap("dump conntrack table", err)
		}
	}
	switch {
	case malformed > 0:
		return fmt.Errorf("dump conntrack table: %d entries: %w", malformed, errMalformed)
	case interrupted:
		return ErrInterrupted
	}
	return nil
}

func (q *Queries) dumpFamily(family uint8, each func(h header, msg []byte)) error {
	if !q.noFilter {
		err := q.query(ipctnlMsgCTGet, netlink.Dump, family, onlyUDP(), each)
		if !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EOPNOTSUPP) {
			return err
		}
		// The kernel checks the filter before it writes the first entry, so
		// each was not called.
		q.noFilter = true
	}
	return q.query(ipctnlMsgCTGet, netlink.Dump, family, nil, each)
}

// onlyUDP encodes a filter for UDP (CTA_FILTER, since Linux 5.8). An older kernel skips the
// unknown attribute and sends all protocols; the parser drops the others.
func onlyUDP() []byte {
	proto := appendAttr(nil, ctaProtoNum, unix.IPPROTO_UDP)
	attrs := appendNest(nil, ctaTupleOrig, appendNest(nil, ctaTupleProto, proto))
	flags := appendAttr(nil, ctaFilterOrigFlags, binary.NativeEndian.AppendUint32(nil, ctaFilterProtoNum)...)
	return appendNest(attrs, ctaFilter, flags)
}
