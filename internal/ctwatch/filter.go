package ctwatch

import (
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// eventFilter is the socket filter of a Watcher: UDP, either family, and no anchor
// that begins. It runs before a message is queued (sk_filter), so what it drops
// costs neither buffer nor wake-up. It looks at the first message of a
// datagram; the kernel sends events one by one.
//
// Drop only what is known to be foreign: where an attribute is missing the
// message passes, and the parser looks again and counts it. The kernel finds
// attributes in its own byte order and the loads are of network byte order,
// so the program is the same on all machines.
func eventFilter() ([]bpf.RawInstruction, error) {
	const (
		drop = 0
		pass = 0xffffffff
	)
	// Slot of the scratch memory: offset of CTA_TUPLE_PROTO.
	const proto = 0

	// find sets A to the offset of attribute typ, at or in what A points to,
	// and passes the message when there is none.
	find := func(ext bpf.Extension, typ uint32) []bpf.Instruction {
		return []bpf.Instruction{
			bpf.LoadConstant{Dst: bpf.RegX, Val: typ},
			bpf.LoadExtension{Num: ext},
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 1},
			bpf.RetConstant{Val: pass},
		}
	}
	// load sets A to the value of the attribute that A points to.
	load := func(size int) []bpf.Instruction {
		return []bpf.Instruction{bpf.TAX{}, bpf.LoadIndirect{Off: attrHdrLen, Size: size}}
	}
	dropIf := func(cond bpf.JumpTest, val uint32) []bpf.Instruction {
		return []bpf.Instruction{
			bpf.JumpIf{Cond: cond, Val: val, SkipFalse: 1},
			bpf.RetConstant{Val: drop},
		}
	}

	var prog []bpf.Instruction
	add := func(parts ...[]bpf.Instruction) {
		for _, p := range parts {
			prog = append(prog, p...)
		}
	}
	add(
		[]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: unix.NLMSG_HDRLEN + nfgenmsgLen}},
		find(bpf.ExtNetlinkAttr, ctaTupleOrig),
		find(bpf.ExtNetlinkAttrNested, ctaTupleProto),
		[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: proto}},
		find(bpf.ExtNetlinkAttrNested, ctaProtoNum),
		load(1),
		dropIf(bpf.JumpNotEqual, unix.IPPROTO_UDP),
	)
	// The type of the message, as its two bytes lie in it on either kind of machine.
	prog = append(prog, bpf.LoadAbsolute{Off: 4, Size: 2})
	for _, gone := range []uint32{unix.NFNL_SUBSYS_CTNETLINK<<8 | ipctnlMsgCTDelete, ipctnlMsgCTDelete<<8 | unix.NFNL_SUBSYS_CTNETLINK} {
		prog = append(prog, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: gone, SkipTrue: 1}, bpf.RetConstant{Val: pass})
	}
	for _, port := range []uint32{ctaProtoSrcPort, ctaProtoDstPort} {
		add(
			[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: proto}},
			find(bpf.ExtNetlinkAttrNested, port),
			load(2),
			dropIf(bpf.JumpEqual, 0),
		)
	}
	prog = append(prog, bpf.RetConstant{Val: pass})
	return bpf.Assemble(prog)
}
