package ctwatch

import (
	"cmp"
	"encoding/binary"
	"net/netip"
	"slices"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// What the filter returns.
const (
	drop = 0
	pass = 0xffffffff
)

// Slots of the scratch memory: offsets of CTA_TUPLE_ORIG and CTA_TUPLE_PROTO, the
// destination address and port, and the source address, of the first packet, and the status.
const (
	origSlot = iota
	protoSlot
	addrSlot
	portSlot
	sourceSlot
	statusSlot
)

// mostSources and mostForwarded bound what the filter compares. The kernel accepts programs
// of 4,096 instructions, and runs the filter for every flow of the gateway. A source takes
// up to 13 of them. A forwarded range takes 7, or 10 with sources, which run only when a DNATed
// flow ends. A served range takes 7.
const mostSources, mostForwarded, mostForSources, mostServed = 128, 256, 32, 16

// leastForwarded is how many ranges a socket has memory for beside mostSources with the default
// of net.core.optmem_max, 20,480 bytes before Linux 6.8.
const leastForwarded = 32

// Sources are the flows whose events a Watcher reports: those that begin in one of
// Prefixes, and those that are expected, DNATed or handled by a conntrack helper.
type Sources struct {
	Prefixes []netip.Prefix // none: all flows
	// Labelled says that other DNATed flows are reported only if they have a label when
	// they begin.
	Labelled bool
	// Forwarded are IPv4 flows that are DNATed and had no label: the kernel does not
	// report labels when a flow ends. IPv6 flows never have one. If there are many, the
	// ends of flows between them are left out too, or with sources reported.
	Forwarded []Range
	// Early says that other flows are reported, too, when they begin, except DNATed ones and IPv4
	// flows of Served. These ranges are for all sources. If there are many, only the first ones count.
	Early  bool
	Served []Range
}

// A Range is all flows whose first packet was for an address and a port in these bounds, which
// are included, and came from such a source, or from any if FirstSource is not set.
type Range struct {
	FirstAddr, LastAddr     netip.Addr
	FirstPort, LastPort     uint16
	FirstSource, LastSource netip.Addr
}

// ofSome reports whether the range is of some sources alone.
func (r Range) ofSome() bool { return r.FirstSource.IsValid() }

// eventFilter is the socket filter of a Watcher. It passes UDP events of both families,
// except new ones with port 0, as anchors have; with prefixes, only those of s. It runs before a message is queued
// (sk_filter), so what it drops costs neither buffer nor wake-up. It looks at the first
// message of a datagram; the kernel sends events one by one.
//
// Drop only what is known to be foreign: if an attribute is missing, the message passes,
// and the parser looks again and counts it. The kernel finds attributes in its own byte
// order and the loads are in network byte order, so the program is the same on all
// machines.
func eventFilter(s Sources) ([]bpf.RawInstruction, error) {
	prog := slices.Concat(
		[]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: nfnl.HeaderLen}},
		find(bpf.ExtNetlinkAttr, nfnl.CTATupleOrig),
		[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: origSlot}},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTATupleProto),
		[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: protoSlot}},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTAProtoNum),
		load(1),
		dropIf(bpf.JumpNotEqual, unix.IPPROTO_UDP),
	)
	var zero []bpf.Instruction
	for _, port := range []uint32{nfnl.CTAProtoSrcPort, nfnl.CTAProtoDstPort} {
		zero = slices.Concat(zero,
			[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: protoSlot}},
			find(bpf.ExtNetlinkAttrNested, port),
			load(2),
			dropIf(bpf.JumpEqual, 0),
		)
	}
	prog = slices.Concat(prog, skipIfGone(zero), zero)
	if len(s.Prefixes) == 0 || len(s.Prefixes) > mostSources {
		return bpf.Assemble(append(prog, bpf.RetConstant{Val: pass}))
	}

	led := []bpf.Instruction{bpf.RetConstant{Val: pass}}
	if s.Labelled { // it must be one of our children, or from one of the prefixes
		led = append(unlessForwarded(fewer(s.Forwarded, mostForwarded)), led...)
		led = append([]bpf.Instruction{
			bpf.LoadAbsolute{Off: unix.NLMSG_HDRLEN, Size: 1}, // the family
			bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: unix.AF_INET6, SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(led))},
		}, led...)
		label := append([]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: nfnl.HeaderLen}}, ifThere(nfnl.CTALabels)...)
		label = append(label, bpf.Jump{Skip: uint32(len(led))})
		led = slices.Concat(skipIfGone(label), label, led)
	}
	of4, of6 := append(fromOneOf(s.Prefixes, true), s.other(true)...), append(fromOneOf(s.Prefixes, false), s.other(false)...)
	prog = slices.Concat(prog,
		[]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: nfnl.HeaderLen}},
		find(bpf.ExtNetlinkAttr, nfnl.CTAStatus),
		load(4),
		[]bpf.Instruction{
			bpf.StoreScratch{Src: bpf.RegA, N: statusSlot},
			bpf.JumpIf{Cond: bpf.JumpBitsNotSet, Val: uint32(cone.StatusExpected), SkipTrue: 1},
			bpf.RetConstant{Val: pass},
			bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: uint32(cone.StatusDstNAT), SkipTrue: 1},
			bpf.Jump{Skip: uint32(len(led))},
		},
		led,
		[]bpf.Instruction{bpf.LoadConstant{Dst: bpf.RegA, Val: nfnl.HeaderLen}},
		ifThere(nfnl.CTAHelp),
		[]bpf.Instruction{
			bpf.LoadAbsolute{Off: unix.NLMSG_HDRLEN, Size: 1}, // the family
			bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.AF_INET, SkipTrue: 1},
			bpf.Jump{Skip: uint32(1 + len(find(0, 0)) + len(find(0, 0)) + len(of4))},
			bpf.LoadScratch{Dst: bpf.RegA, N: origSlot},
		},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTATupleIP),
		find(bpf.ExtNetlinkAttrNested, nfnl.CTAIPv4Src),
		of4,
		[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: origSlot}},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTATupleIP),
		find(bpf.ExtNetlinkAttrNested, nfnl.CTAIPv6Src),
		of6,
	)
	return bpf.Assemble(prog)
}

// other returns what decides about flows that come from none of the prefixes.
func (s *Sources) other(is4 bool) []bpf.Instruction {
	last := []bpf.Instruction{bpf.RetConstant{Val: drop}}
	if !s.Early {
		return last
	}
	begins := []bpf.Instruction{bpf.RetConstant{Val: pass}}
	if is4 {
		begins = append(unlessForwarded(s.Served[:min(len(s.Served), mostServed)]), begins...)
	}
	begins = slices.Concat(
		[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: statusSlot}},
		dropIf(bpf.JumpBitsSet, uint32(cone.StatusDstNAT)),
		begins,
	)
	return slices.Concat(skipIfGone(begins), begins, last)
}

// unlessForwarded skips the instruction that follows it if the flow is in one of the ranges.
func unlessForwarded(forwarded []Range) []bpf.Instruction {
	if len(forwarded) == 0 {
		return nil
	}
	prog := slices.Concat(
		[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: origSlot}},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTATupleIP),
		find(bpf.ExtNetlinkAttrNested, nfnl.CTAIPv4Dst),
		load(4),
		[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: addrSlot}, bpf.LoadScratch{Dst: bpf.RegA, N: protoSlot}},
		find(bpf.ExtNetlinkAttrNested, nfnl.CTAProtoDstPort),
		load(2),
		[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: portSlot}},
	)
	if slices.ContainsFunc(forwarded, Range.ofSome) {
		prog = slices.Concat(prog,
			[]bpf.Instruction{bpf.LoadScratch{Dst: bpf.RegA, N: origSlot}},
			find(bpf.ExtNetlinkAttrNested, nfnl.CTATupleIP),
			find(bpf.ExtNetlinkAttrNested, nfnl.CTAIPv4Src),
			load(4),
			[]bpf.Instruction{bpf.StoreScratch{Src: bpf.RegA, N: sourceSlot}},
		)
	}
	number := func(a netip.Addr) uint32 {
		b := a.As4()
		return binary.BigEndian.Uint32(b[:])
	}
	var tests []bpf.Instruction // made from the last one to the first
	for _, r := range slices.Backward(forwarded) {
		test := []bpf.Instruction{bpf.Jump{Skip: uint32(len(tests) + 1)}}
		test = append(unlessIn(portSlot, uint32(r.FirstPort), uint32(r.LastPort), len(test)), test...)
		test = append(unlessIn(addrSlot, number(r.FirstAddr), number(r.LastAddr), len(test)), test...)
		if r.ofSome() {
			test = append(unlessIn(sourceSlot, number(r.FirstSource), number(r.LastSource), len(test)), test...)
		}
		tests = append(test, tests...)
	}
	return append(prog, tests...)
}

// unlessIn skips some instructions unless what a slot of the scratch memory has is in bounds.
func unlessIn(slot int, first, last uint32, skip int) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadScratch{Dst: bpf.RegA, N: slot},
		bpf.JumpIf{Cond: bpf.JumpLessThan, Val: first, SkipTrue: uint8(skip + 1)},
		bpf.JumpIf{Cond: bpf.JumpGreaterThan, Val: last, SkipTrue: uint8(skip)},
	}
}

// fewer returns at most most ranges, and those of some sources: the first few of these, and
// ranges that cover all others.
func fewer(ranges []Range, most int) (few []Range) {
	var ofSome, ofAll []Range
	for _, r := range ranges {
		if r.ofSome() {
			ofSome = append(ofSome, r)
		} else {
			ofAll = append(ofAll, r)
		}
	}
	return append(cover(ofAll, most), ofSome[:min(len(ofSome), most*mostForSources/mostForwarded)]...)
}

// cover returns at most most ranges that cover the given ones. It merges the ranges that
// are nearest to each other, those on the same addresses first.
func cover(ranges []Range, most int) (few []Range) {
	if len(ranges) <= most {
		return ranges
	}
	ranges = slices.Clone(ranges)
	slices.SortFunc(ranges, func(a, b Range) int {
		return cmp.Or(a.FirstAddr.Compare(b.FirstAddr), a.LastAddr.Compare(b.LastAddr), cmp.Compare(a.FirstPort, b.FirstPort))
	})
	number := func(a netip.Addr) int64 {
		b := a.As4()
		return int64(binary.BigEndian.Uint32(b[:]))
	}
	gaps := make([]int64, len(ranges)) // to the one before
	for i := range ranges[1:] {
		a, b := ranges[i], ranges[i+1]
		if gaps[i+1] = max(0, int64(b.FirstPort)-int64(a.LastPort)); a.FirstAddr != b.FirstAddr || a.LastAddr != b.LastAddr {
			gaps[i+1] = 1<<16 + max(number(b.FirstAddr)-number(a.FirstAddr), number(b.LastAddr)-number(a.LastAddr))
		}
	}
	sorted := slices.Sorted(slices.Values(gaps[1:]))
	closed := len(ranges) - most
	widest := sorted[closed-1]
	narrower, _ := slices.BinarySearch(sorted, widest)
	asWide := closed - narrower // how many gaps of this width may be closed
	for i, r := range ranges {
		if i == 0 || gaps[i] > widest || gaps[i] == widest && asWide == 0 {
			few = append(few, r)
			continue
		}
		if gaps[i] == widest {
			asWide--
		}
		last := &few[len(few)-1]
		if last.LastAddr.Less(r.LastAddr) {
			last.LastAddr = r.LastAddr
		}
		last.FirstPort, last.LastPort = min(last.FirstPort, r.FirstPort), max(last.LastPort, r.LastPort)
	}
	return few
}

// find sets A to the offset of attribute typ, at or inside what A points to. It passes the
// message if there is none.
func find(ext bpf.Extension, typ uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegX, Val: typ},
		bpf.LoadExtension{Num: ext},
		bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{Val: pass},
	}
}

// ifThere passes the message if there is an attribute typ at what A points to.
func ifThere(typ uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.LoadConstant{Dst: bpf.RegX, Val: typ},
		bpf.LoadExtension{Num: bpf.ExtNetlinkAttr},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: 0, SkipTrue: 1},
		bpf.RetConstant{Val: pass},
	}
}

// skipIfGone skips the following instructions if the message says that a flow ended. It
// compares the two bytes of the message type in both byte orders, for either kind of
// machine.
func skipIfGone(following []bpf.Instruction) []bpf.Instruction {
	prog := []bpf.Instruction{bpf.LoadAbsolute{Off: 4, Size: 2}}
	for i, gone := range []uint32{unix.NFNL_SUBSYS_CTNETLINK<<8 | ipctnlMsgCTDelete, ipctnlMsgCTDelete<<8 | unix.NFNL_SUBSYS_CTNETLINK} {
		prog = append(prog, bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: gone, SkipTrue: 1}, bpf.Jump{Skip: uint32(2*(1-i) + len(following))})
	}
	return prog
}

// load sets A to the value of the attribute that A points to.
func load(size int) []bpf.Instruction {
	return []bpf.Instruction{bpf.TAX{}, bpf.LoadIndirect{Off: unix.NLA_HDRLEN, Size: size}}
}

func dropIf(cond bpf.JumpTest, val uint32) []bpf.Instruction {
	return []bpf.Instruction{
		bpf.JumpIf{Cond: cond, Val: val, SkipFalse: 1},
		bpf.RetConstant{Val: drop},
	}
}

// fromOneOf passes the message if the address that A points to is in one of the prefixes of
// its family.
func fromOneOf(prefixes []netip.Prefix, is4 bool) []bpf.Instruction {
	prog := []bpf.Instruction{bpf.TAX{}}
	for _, p := range prefixes {
		if p.Addr().Is4() != is4 {
			continue
		}
		addr := p.Masked().Addr().AsSlice()
		for i := 0; 32*i < p.Bits(); i++ {
			next := (p.Bits()+31)/32 - i - 1 // words still to compare
			prog = append(prog,
				bpf.LoadIndirect{Off: uint32(unix.NLA_HDRLEN + 4*i), Size: 4},
				bpf.ALUOpConstant{Op: bpf.ALUOpAnd, Val: ^uint32(0) << max(32*(i+1)-p.Bits(), 0)},
				bpf.JumpIf{Cond: bpf.JumpNotEqual, Val: binary.BigEndian.Uint32(addr[4*i:]), SkipTrue: uint8(3*next + 1)})
		}
		prog = append(prog, bpf.RetConstant{Val: pass})
	}
	return prog
}
