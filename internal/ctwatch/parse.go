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
func parse(h header, msg []byte, f *cone.Flow) (Kind, error) {
	var kind Kind
	switch {
	case h.typ == ctType(ipctnlMsgCTDelete):
		kind = Gone
	case h.typ == ctType(ipctnlMsgCTNew) && h.flags&(unix.NLM_F_CREATE|unix.NLM_F_EXCL) != 0:
		kind = New
	default: // an update has the type of a new flow without those flags
		return 0, errForeign
	}
	if err := parseFlow(msg[unix.NLMSG_HDRLEN:], f); err != nil {
		return 0, err
	}
	if kind == New && isAnchor(f) {
		return 0, errForeign
	}
	f.Began = kind == New && !f.Status.Has(cone.StatusSeenReply) // else another program made the entry
	return kind, nil
}

// isAnchor reports whether f is an entry that the expect backend made. Real
// packets do not use port 0.
func isAnchor(f *cone.Flow) bool { return f.Src.Port == 0 || f.Dst.Port == 0 }

// parseFlow decodes nfgenmsg and the attributes behind it (ctnetlink_fill_info). It skips
// unknown attributes, so that a newer kernel does not stop us.
func parseFlow(b []byte, f *cone.Flow) error {
	if len(b) < nfgenmsgLen || b[1] != unix.NFNETLINK_V0 {
		return errMalformed
	}
	family := b[0] // parseIP accepts IPv4 and IPv6

	*f = cone.Flow{}
	var orig, reply, master tuple
	var zone uint16
	for b = b[nfgenmsgLen:]; len(b) > 0; {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return errMalformed
		}
		b = rest
		switch typ {
		case ctaTupleOrig:
			ok = orig.parse(val, family)
			if ok && orig.proto != unix.IPPROTO_UDP {
				return errForeign // the rest is of no interest
			}
		case ctaTupleReply:
			ok = reply.parse(val, family)
		case ctaTupleMaster:
			ok = master.parse(val, family)
		case ctaStatus:
			var v uint32
			v, ok = uint32Of(val)
			f.Status = cone.Status(v)
		case ctaHelp: // the kernel sends it only if there is a helper
			f.Helped = true
		case ctaLabels:
			f.Labelled = nfnl.HasChildLabel(val)
		case ctaTimeout: // in seconds, which the kernel rounds down
			var v uint32
			v, ok = uint32Of(val)
			f.Left = time.Duration(v) * time.Second
		case ctaMark:
			f.Mark, ok = uint32Of(val)
		case ctaID:
			f.ID, ok = uint32Of(val)
		case ctaZone:
			zone, ok = uint16Of(val)
		case ctaCountersOrig:
			ok = parsePackets(val, &f.OrigPackets, &f.HasCounters)
		case ctaCountersReply:
			ok = parsePackets(val, &f.ReplyPackets, &f.HasCounters)
		}
		if !ok {
			return errMalformed
		}
	}

	if !orig.hasPorts() || !reply.hasPorts() || reply.proto != unix.IPPROTO_UDP {
		return errMalformed
	}
	f.Src, f.Dst = orig.src, orig.dst
	f.ReplySrc, f.ReplyDst = reply.src, reply.dst
	f.MasterSrc, f.MasterDst = master.src, master.dst

	// CTA_ZONE is the zone of both directions. The zone of a single direction is in the
	// tuple of that direction (ctnetlink_dump_zone_id).
	f.OrigZone, f.ReplyZone = zone, zone
	if orig.zone != 0 {
		f.OrigZone = orig.zone
	}
	if reply.zone != 0 {
		f.ReplyZone = reply.zone
	}
	f.Labelled = f.Labelled && f.ReplyZone == 0 // the map serves zone 0 only: else it is not our label
	return nil
}

// tuple is one direction of an entry. The master of an expected flow need not be UDP, so a
// tuple without ports is valid.
type tuple struct {
	src, dst     cone.Endpoint
	zone         uint16
	proto        uint8
	sport, dport bool // present
}

func (t *tuple) hasPorts() bool { return t.sport && t.dport }

// parse decodes a CTA_TUPLE_* attribute. t must be empty: a tuple that comes twice is
// refused.
func (t *tuple) parse(b []byte, family uint8) bool {
	if t.proto != 0 {
		return false
	}
	var haveIP bool
	for len(b) > 0 {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return false
		}
		b = rest
		switch typ {
		case ctaTupleIP:
			ok = t.parseIP(val, family)
			haveIP = true
		case ctaTupleProto:
			ok = t.parseProto(val)
		case ctaTupleZone:
			t.zone, ok = uint16Of(val)
		}
		if !ok {
			return false
		}
	}
	return haveIP && t.proto != 0
}

func (t *tuple) parseIP(b []byte, family uint8) bool {
	var src, dst bool
	for len(b) > 0 {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return false
		}
		b = rest
		switch {
		case family == unix.AF_INET && (typ == ctaIPv4Src || typ == ctaIPv4Dst):
			if len(val) != 4 {
				return false
			}
			if typ == ctaIPv4Src {
				t.src.Addr, src = cone.AddrFrom4([4]byte(val)), true
			} else {
				t.dst.Addr, dst = cone.AddrFrom4([4]byte(val)), true
			}
		case family == unix.AF_INET6 && (typ == ctaIPv6Src || typ == ctaIPv6Dst):
			if len(val) != 16 {
				return false
			}
			if typ == ctaIPv6Src {
				t.src.Addr, src = cone.Addr(val), true
			} else {
				t.dst.Addr, dst = cone.Addr(val), true
			}
		}
	}
	return src && dst
}

func (t *tuple) parseProto(b []byte) bool {
	if t.proto != 0 {
		return false
	}
	for len(b) > 0 {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return false
		}
		b = rest
		switch typ {
		case ctaProtoNum:
			if ok = len(val) == 1; ok {
				t.proto = val[0]
			}
		case ctaProtoSrcPort:
			t.src.Port, ok = uint16Of(val)
			t.sport = true
		case ctaProtoDstPort:
			t.dst.Port, ok = uint16Of(val)
			t.dport = true
		}
		if !ok {
			return false
		}
	}
	return t.proto != 0
}

// parsePackets decodes the packet count of a CTA_COUNTERS_* attribute; old
// kernels wrote 32 bits.
func parsePackets(b []byte, n *uint64, have *bool) bool {
	for len(b) > 0 {
		typ, val, rest, ok := nextAttr(b)
		if !ok {
			return false
		}
		b = rest
		switch typ {
		case ctaCountersPackets:
			if len(val) != 8 {
				return false
			}
			*n, *have = binary.BigEndian.Uint64(val), true
		case ctaCounters32Packets:
			v, ok := uint32Of(val)
			if !ok {
				return false
			}
			*n, *have = uint64(v), true
		}
	}
	return true
}

func uint16Of(b []byte) (uint16, bool) {
	if len(b) != 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(b), true
}

func uint32Of(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}
