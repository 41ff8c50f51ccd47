package ctwatch

import "golang.org/x/sys/unix"

// Messages of linux/netfilter/nfnetlink_conntrack.h, and attributes that only this package
// reads.
const (
	ipctnlMsgCTNew      = 0
	ipctnlMsgCTGet      = 1
	ipctnlMsgCTDelete   = 2
	ipctnlMsgCTGetStats = 5

	ctaCountersPackets   = 1
	ctaCounters32Packets = 3

	ctaStatsGlobalEntries    = 1
	ctaStatsGlobalMaxEntries = 2

	ctaFilterOrigFlags = 1
	// ctaFilterProtoNum is CTA_FILTER_F_CTA_PROTO_NUM of nf_conntrack_netlink.c.
	ctaFilterProtoNum = 1 << 3
)

// ctType returns the netlink type of a conntrack message.
func ctType(msg uint16) uint16 { return unix.NFNL_SUBSYS_CTNETLINK<<8 | msg }
