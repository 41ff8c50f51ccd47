package ctwatch

import (
	"encoding/binary"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

var (
	// errForeign marks a valid message that is not an event of a UDP flow.
	errForeign = errors.New("not an event of a UDP flow")
	// errMalformed marks a message that the kernel does not write.
	errMalformed = errors.New("malformed conntrack message")
)

// parse decodes one event, netlink header included, as ctnetlink_conntrack_event of the
// kernel writes it. It does not allocate and keeps no part of msg. The error is errForeign
// or errMalformed; the content of f is then undefined.
func parse(h nfnl.Header, msg []byte, f *cone.Flow) (Kind, error) {
	var kind Kind
	switch {
	case h.Type == ctType(ipctnlMsgCTDelete):
		kind = Gone
	case h.Type == ctType(ipctnlMsgCTNew) && h.Flags&(unix.NLM_F_CREATE|unix.NLM_F_EXCL) != 0:
		kind = New
	default: // an update has the type of a new flow without those flags
		return 0, errForeign
	}
	if err := parseFlow(msg[unix.NLMSG_HDRLEN:], f); err != nil {
		return 0, err
	}
	if kind == New && hasPortZero(f) {
		return 0, errForeign
	}
	f.Began = kind == New && !f.Status.Has(cone.StatusSeenReply) // else another program made the entry
	return kind, nil
}

// hasPortZero reports whether f uses port 0. Real packets do not, but all anchors do
// (cone.IsAnchor).
func hasPortZero(f *cone.Flow) bool { return f.Src.Port == 0 || f.Dst.Port == 0 }

// parseFlow decodes nfgenmsg and the attributes behind it (ctnetlink_fill_info). It skips
// unknown attributes, so that a newer kernel does not stop us.
func parseFlow(b []byte, f *cone.Flow) error {
	if len(b) < nfnl.FamilyHeaderLen || b[1] != unix.NFNETLINK_V0 {
		return errMalformed
	}
	family := b[0]

	*f = cone.Flow{}
	var orig, reply, master nfnl.Tuple
	var zone uint16
	foreign := false
	sound := nfnl.EachAttribute(b[nfnl.FamilyHeaderLen:], func(typ uint16, val []byte) bool {
		ok := true
		switch typ {
		case nfnl.CTATupleOrig:
			ok = orig.Parse(val, family)
			foreign = ok && orig.Proto != unix.IPPROTO_UDP
			ok = ok && !foreign // the rest is of no interest
		case nfnl.CTATupleReply:
			ok = reply.Parse(val, family)
		case nfnl.CTATupleMaster:
			ok = master.Parse(val, family)
		case nfnl.CTAStatus:
			var v uint32
			v, ok = nfnl.BE32(val)
			f.Status = cone.Status(v)
		case nfnl.CTAHelp: // the kernel sends it only if there is a helper
			f.Helped = true
		case nfnl.CTALabels:
			f.Labelled = nfnl.HasChildLabel(val)
		case nfnl.CTATimeout: // in seconds, which the kernel rounds down
			var v uint32
			v, ok = nfnl.BE32(val)
			f.Left = time.Duration(v) * time.Second
		case nfnl.CTAMark:
			f.Mark, ok = nfnl.BE32(val)
		case nfnl.CTAID:
			f.ID, ok = nfnl.BE32(val)
		case nfnl.CTAZone:
			zone, ok = nfnl.BE16(val)
		case nfnl.CTACountersOrig:
			ok = parsePackets(val, &f.OrigPackets, &f.HasCounters)
		case nfnl.CTACountersReply:
			ok = parsePackets(val, &f.ReplyPackets, &f.HasCounters)
		}
		return ok
	})

	if foreign {
		return errForeign
	}
	if !sound || !orig.HasPorts() || !reply.HasPorts() || reply.Proto != unix.IPPROTO_UDP {
		return errMalformed
	}
	f.Src, f.Dst = orig.Src, orig.Dst
	f.ReplySrc, f.ReplyDst = reply.Src, reply.Dst
	f.MasterSrc, f.MasterDst = master.Src, master.Dst

	// CTA_ZONE is the zone of both directions. The zone of a single direction is in the
	// tuple of that direction (ctnetlink_dump_zone_id).
	f.OrigZone, f.ReplyZone = zone, zone
	if orig.Zone != 0 {
		f.OrigZone = orig.Zone
	}
	if reply.Zone != 0 {
		f.ReplyZone = reply.Zone
	}
	f.Labelled = f.Labelled && f.ReplyZone == 0 // the map serves zone 0 only: else it is not our label
	return nil
}

// parsePackets decodes the packet count of a CTA_COUNTERS_* attribute; old
// kernels wrote 32 bits.
func parsePackets(b []byte, n *uint64, have *bool) bool {
	return nfnl.EachAttribute(b, func(typ uint16, val []byte) bool {
		switch typ {
		case ctaCountersPackets:
			if len(val) != 8 {
				return false
			}
			*n, *have = binary.BigEndian.Uint64(val), true
		case ctaCounters32Packets:
			v, ok := nfnl.BE32(val)
			if !ok {
				return false
			}
			*n, *have = uint64(v), true
		}
		return true
	})
}
