package ctwatch

import (
	"encoding/binary"

	"golang.org/x/sys/unix"
)

// Messages and attributes of linux/netfilter/nfnetlink_conntrack.h. Headers
// and attribute headers are in host byte order, values in network byte order.
const (
	ipctnlMsgCTNew      = 0
	ipctnlMsgCTGet      = 1
	ipctnlMsgCTDelete   = 2
	ipctnlMsgCTGetStats = 5

	ctaTupleOrig     = 1
	ctaTupleReply    = 2
	ctaStatus        = 3
	ctaHelp          = 5
	ctaTimeout       = 7
	ctaMark          = 8
	ctaCountersOrig  = 9
	ctaCountersReply = 10
	ctaID            = 12
	ctaTupleMaster   = 14
	ctaZone          = 18
	ctaLabels        = 22
	ctaFilter        = 25

	ctaTupleIP    = 1
	ctaTupleProto = 2
	ctaTupleZone  = 3

	ctaIPv4Src = 1
	ctaIPv4Dst = 2
	ctaIPv6Src = 3
	ctaIPv6Dst = 4

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaCountersPackets   = 1
	ctaCounters32Packets = 3

	ctaStatsGlobalEntries    = 1
	ctaStatsGlobalMaxEntries = 2

	ctaFilterOrigFlags = 1
	// ctaFilterProtoNum is CTA_FILTER_F_CTA_PROTO_NUM of nf_conntrack_netlink.c.
	ctaFilterProtoNum = 1 << 3
)

const (
	nfgenmsgLen = 4
	attrHdrLen  = 4
	// attributesAt is where the attributes of a message begin.
	attributesAt = unix.NLMSG_HDRLEN + nfgenmsgLen
	// The upper two bits of an attribute's type are NLA_F_NESTED and
	// NLA_F_NET_BYTEORDER.
	attrTypeMask = 0x3fff
)

// ctType returns the netlink type of a conntrack message.
func ctType(msg uint16) uint16 { return unix.NFNL_SUBSYS_CTNETLINK<<8 | msg }

func align4(n int) int { return (n + 3) &^ 3 }

// header is the part of struct nlmsghdr that we read.
type header struct {
	typ, flags uint16
	seq        uint32
}

// nextMessage splits the first message off a datagram. msg includes the header. If ok is
// false, nothing more of b can be read.
func nextMessage(b []byte) (h header, msg, rest []byte, ok bool) {
	if len(b) < unix.NLMSG_HDRLEN {
		return header{}, nil, nil, false
	}
	// Compare unsigned: the length may not fit an int of 32 bits.
	n := binary.NativeEndian.Uint32(b)
	if n < unix.NLMSG_HDRLEN || uint64(n) > uint64(len(b)) {
		return header{}, nil, nil, false
	}
	h = header{
		typ:   binary.NativeEndian.Uint16(b[4:]),
		flags: binary.NativeEndian.Uint16(b[6:]),
		seq:   binary.NativeEndian.Uint32(b[8:]),
	}
	return h, b[:n], b[min(align4(int(n)), len(b)):], true
}

// nextAttr splits the first attribute off b, which must not be empty.
func nextAttr(b []byte) (typ uint16, val, rest []byte, ok bool) {
	if len(b) < attrHdrLen {
		return 0, nil, nil, false
	}
	n := int(binary.NativeEndian.Uint16(b))
	if n < attrHdrLen || n > len(b) {
		return 0, nil, nil, false
	}
	typ = binary.NativeEndian.Uint16(b[2:]) & attrTypeMask
	return typ, b[attrHdrLen:n], b[min(align4(n), len(b)):], true
}

// appendAttr appends one attribute, padded.
func appendAttr(b []byte, typ uint16, val ...byte) []byte {
	b = binary.NativeEndian.AppendUint16(b, uint16(attrHdrLen+len(val)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = append(b, val...)
	return append(b, make([]byte, align4(len(val))-len(val))...)
}

// appendNest appends an attribute that holds attributes.
func appendNest(b []byte, typ uint16, val []byte) []byte {
	return appendAttr(b, typ|unix.NLA_F_NESTED, val...)
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
