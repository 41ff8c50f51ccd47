package ctwatch

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// parseOne decodes b, which is one message.
func parseOne(b []byte, f *cone.Flow) (Kind, error) {
	h, msg, _, ok := nfnl.NextMessage(b)
	if !ok {
		return 0, errMalformed
	}
	return parse(h, msg, f)
}

// golden are events of Linux 6.18 on x86-64.
var golden = []struct {
	name string
	hex  string
	kind Kind
	want cone.Flow
}{
	{
		name: "new source-NATed flow with a mark",
		hex: "9c0000000001000600000000000000000200000034000180" +
			"14000180080001007f000001080002007f0000021c0002800500010011000000060002009c4000000600030003e90000" +
			"34000280" +
			"14000180080001007f000002080002007f0000091c00028005000100110000000600020003e9000006000300115c0000" +
			"08000c00eeb9c9900800030000000198080007000000001e0800080011223344",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0xeeb9c990, Mark: 0x11223344, Status: 0x198,
			Src: endpoint("127.0.0.1:40000"), Dst: endpoint("127.0.0.2:1001"),
			ReplySrc: endpoint("127.0.0.2:1001"), ReplyDst: endpoint("127.0.0.9:4444"),
		},
	},
	{
		name: "new flow with a helper",
		hex: "a40000000001000600000000000000000200000034000180" +
			"14000180080001007f000001080002007f0000011c0002800500010011000000060002009c4000000600030000450000" +
			"34000280" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020000450000060003009c400000" +
			"08000c00f52ea37a0800030000002188080007000000001e10000580090001007466747000000000",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0xf52ea37a, Status: 0x2188, Helped: true,
			Src: endpoint("127.0.0.1:40000"), Dst: endpoint("127.0.0.1:69"),
			ReplySrc: endpoint("127.0.0.1:69"), ReplyDst: endpoint("127.0.0.1:40000"),
		},
	},
	{
		name: "new expected child with its master",
		hex: "c80000000001000600000000000000000200000034000180" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020015b30000060003009c400000" +
			"34000280" +
			"14000180080001007f000001080002007f0000011c0002800500010011000000060002009c4000000600030015b30000" +
			"08000c005f60dd9a0800030000000189080007000000001e" +
			"34000e80" +
			"14000180080001007f000001080002007f0000011c0002800500010011000000060002009c4000000600030000450000",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0x5f60dd9a, Status: 0x189,
			Src: endpoint("127.0.0.1:5555"), Dst: endpoint("127.0.0.1:40000"),
			ReplySrc: endpoint("127.0.0.1:40000"), ReplyDst: endpoint("127.0.0.1:5555"),
			MasterSrc: endpoint("127.0.0.1:40000"), MasterDst: endpoint("127.0.0.1:69"),
		},
	},
	{
		name: "zone in the original direction",
		hex: "9c000000000100060000000000000000020000003c000180" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020015b300000600030003ef0000" +
			"0600030000070000" +
			"34000280" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020003ef00000600030015b30000" +
			"08000c002fcc93410800030000000188080007000000001e",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0x2fcc9341, Status: 0x188, OrigZone: 7,
			Src: endpoint("127.0.0.1:5555"), Dst: endpoint("127.0.0.1:1007"),
			ReplySrc: endpoint("127.0.0.1:1007"), ReplyDst: endpoint("127.0.0.1:5555"),
		},
	},
	{
		name: "zone in the reply direction",
		hex: "9c0000000001000600000000000000000200000034000180" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020015b300000600030003f00000" +
			"3c000280" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020003f000000600030015b30000" +
			"0600030000080000" +
			"08000c00e0f5ec230800030000000188080007000000001e",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0xe0f5ec23, Status: 0x188, ReplyZone: 8,
			Src: endpoint("127.0.0.1:5555"), Dst: endpoint("127.0.0.1:1008"),
			ReplySrc: endpoint("127.0.0.1:1008"), ReplyDst: endpoint("127.0.0.1:5555"),
		},
	},
	{
		name: "zone in both directions",
		hex: "9c0000000001000600000000000000000200000034000180" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020015b300000600030003f10000" +
			"34000280" +
			"14000180080001007f000001080002007f0000011c00028005000100110000000600020003f100000600030015b30000" +
			"060012000009000008000c00c1ad64290800030000000188080007000000001e",
		kind: New,
		want: cone.Flow{
			Began: true, Left: 30 * time.Second, ID: 0xc1ad6429, Status: 0x188, OrigZone: 9, ReplyZone: 9,
			Src: endpoint("127.0.0.1:5555"), Dst: endpoint("127.0.0.1:1009"),
			ReplySrc: endpoint("127.0.0.1:1009"), ReplyDst: endpoint("127.0.0.1:5555"),
		},
	},
	{
		name: "destroyed IPv6 flow with counters",
		hex: "fc0000000201000000000000087258e30a0000004c000180" +
			"2c0001801400030000000000000000000000000000000001140004000000000000000000000000000000000" +
			"11c0002800500010011000000060002001a0a0000060003001e610000" +
			"4c000280" +
			"2c0001801400030000000000000000000000000000000001140004000000000000000000000000000000000" +
			"11c0002800500010011000000060002001e610000060003001a0a0000" +
			"08000c0093ae6ef40800030000000208080007000000001d" +
			"1c0009800c00010000000000000000010c00020000000000000000311c000a800c00010000000000000000000c0002000000000000000000",
		kind: Gone,
		want: cone.Flow{
			Left: 29 * time.Second, ID: 0x93ae6ef4, Status: 0x208,
			Src: endpoint("[::1]:6666"), Dst: endpoint("[::1]:7777"),
			ReplySrc: endpoint("[::1]:7777"), ReplyDst: endpoint("[::1]:6666"),
			OrigPackets: 1, HasCounters: true,
		},
	},
}

func goldenBytes(t testing.TB, s string) []byte {
	t.Helper()
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the golden bytes are those of a little-endian machine")
	}
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestParseReadsWhatTheKernelWrites(t *testing.T) {
	for _, tt := range golden {
		t.Run(tt.name, func(t *testing.T) {
			b := goldenBytes(t, tt.hex)
			got := cone.Flow{Mark: 0xdead, MasterSrc: endpoint("192.0.2.1:1")} // of an earlier use
			kind, err := parseOne(b, &got)
			if err != nil || kind != tt.kind {
				t.Fatalf("kind %v, error %v, want %v", kind, err, tt.kind)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			compareWithReference(t, b, kind, got, true)
		})
	}
}

// A message builder for messages that no kernel at hand writes.

// netlinkMsg puts a netlink header before b.
func netlinkMsg(typ, flags uint16, b []byte) []byte {
	h := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(b)))
	h = binary.NativeEndian.AppendUint16(h, typ)
	h = binary.NativeEndian.AppendUint16(h, flags)
	return append(append(h, make([]byte, 8)...), b...)
}

func newMsg(parts ...[]byte) []byte {
	return netlinkMsg(ctType(ipctnlMsgCTNew), unix.NLM_F_CREATE|unix.NLM_F_EXCL,
		append([]byte{unix.AF_INET, 0, 0, 0}, bytes.Join(parts, nil)...))
}

func attr(typ uint16, val ...byte) []byte {
	var e nfnl.Encoder
	e.Bytes(typ, val)
	return e.B
}

func nest(typ uint16, parts ...[]byte) []byte {
	return attr(typ|unix.NLA_F_NESTED, bytes.Join(parts, nil)...)
}

var (
	ip4 = nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Src, 192, 0, 2, 1), attr(nfnl.CTAIPv4Dst, 192, 0, 2, 2))
	ip6 = nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv6Src, make([]byte, 16)...), attr(nfnl.CTAIPv6Dst, make([]byte, 16)...))
)

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }

func proto(num byte, sport, dport uint16) []byte {
	return nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, num), attr(nfnl.CTAProtoSrcPort, be16(sport)...), attr(nfnl.CTAProtoDstPort, be16(dport)...))
}

// tuples is a valid flow that the cases below add to.
var tuples = bytes.Join([][]byte{
	nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 2)),
	nest(nfnl.CTATupleReply, ip4, proto(17, 2, 1)),
}, nil)

// withOrig is a valid message except for its original tuple.
func withOrig(parts ...[]byte) []byte {
	return newMsg(nest(nfnl.CTATupleOrig, parts...), nest(nfnl.CTATupleReply, ip4, proto(17, 2, 1)))
}

var oddMessages = []struct {
	name string
	msg  []byte
	want error
}{
	{"sound", newMsg(tuples), nil},
	{"unknown attributes at each level", newMsg(
		nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 2), attr(99, 1)),
		nest(nfnl.CTATupleReply,
			nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Src, 1, 2, 3, 4), attr(nfnl.CTAIPv4Dst, 1, 2, 3, 4), attr(99, 1, 2, 3)),
			nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 17), attr(99), attr(nfnl.CTAProtoSrcPort, 0, 1), attr(nfnl.CTAProtoDstPort, 0, 1))),
		nest(nfnl.CTACountersOrig, attr(99)), attr(99, 1, 2, 3, 4, 5)), nil},
	{"type that is known in its low byte alone", newMsg(tuples, attr(0x0100|nfnl.CTAID, 1, 2)), nil},
	{"TCP master", newMsg(tuples, nest(nfnl.CTATupleMaster, ip4, proto(6, 1, 2))), nil},
	{"master without ports", newMsg(tuples, nest(nfnl.CTATupleMaster, ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 47)))), nil},

	{"TCP", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(6, 1, 2)), nest(nfnl.CTATupleReply, ip4, proto(6, 2, 1))), errForeign},
	{"ICMP", newMsg(nest(nfnl.CTATupleOrig, ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 1)))), errForeign},
	{"anchor by source port", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 0, 2)), nest(nfnl.CTATupleReply, ip4, proto(17, 2, 0))), errForeign},
	{"anchor by destination port", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 0)), nest(nfnl.CTATupleReply, ip4, proto(17, 0, 1))), errForeign},
	{"update", netlinkMsg(ctType(ipctnlMsgCTNew), 0, append([]byte{unix.AF_INET, 0, 0, 0}, tuples...)), errForeign},
	{"expectation", netlinkMsg(unix.NFNL_SUBSYS_CTNETLINK_EXP<<8, unix.NLM_F_CREATE, append([]byte{unix.AF_INET, 0, 0, 0}, tuples...)), errForeign},
	{"netlink error", netlinkMsg(unix.NLMSG_ERROR, 0, make([]byte, 4)), errForeign},

	{"no nfgenmsg", netlinkMsg(ctType(ipctnlMsgCTDelete), 0, []byte{2, 0}), errMalformed},
	{"other version", netlinkMsg(ctType(ipctnlMsgCTDelete), 0, append([]byte{unix.AF_INET, 1, 0, 0}, tuples...)), errMalformed},
	{"other family", netlinkMsg(ctType(ipctnlMsgCTDelete), 0, append([]byte{unix.AF_BRIDGE, 0, 0, 0}, tuples...)), errMalformed},
	{"IPv6 addresses in an IPv4 message", newMsg(nest(nfnl.CTATupleOrig, ip6, proto(17, 1, 2)), nest(nfnl.CTATupleReply, ip6, proto(17, 2, 1))), errMalformed},
	{"no attributes", newMsg(), errMalformed},
	{"no reply", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 2))), errMalformed},
	{"reply of TCP", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 2)), nest(nfnl.CTATupleReply, ip4, proto(6, 2, 1))), errMalformed},
	{"tuple twice", newMsg(tuples, nest(nfnl.CTATupleOrig, ip4, proto(17, 3, 4))), errMalformed},
	{"protocol twice", withOrig(ip4, proto(17, 1, 2), proto(17, 1, 2)), errMalformed},
	{"tuple without addresses", withOrig(proto(17, 1, 2)), errMalformed},
	{"tuple without protocol", withOrig(ip4), errMalformed},
	{"tuple without destination address", withOrig(nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Src, 1, 2, 3, 4)), proto(17, 1, 2)), errMalformed},
	{"tuple without source address", withOrig(nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Dst, 1, 2, 3, 4)), proto(17, 1, 2)), errMalformed},
	{"UDP without destination port", withOrig(ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 17), attr(nfnl.CTAProtoSrcPort, 0, 1))), errMalformed},
	{"long address", withOrig(nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Src, 1, 2, 3, 4, 5), attr(nfnl.CTAIPv4Dst, 1, 2, 3, 4)), proto(17, 1, 2)), errMalformed},
	{"short port", withOrig(ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 17), attr(nfnl.CTAProtoSrcPort, 1), attr(nfnl.CTAProtoDstPort, 0, 1))), errMalformed},
	{"long protocol", withOrig(ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 17, 0), attr(nfnl.CTAProtoSrcPort, 0, 1), attr(nfnl.CTAProtoDstPort, 0, 1))), errMalformed},
	{"tuple twice, then without protocol", newMsg(tuples, nest(nfnl.CTATupleOrig, ip4)), errMalformed},
	{"IPv4 addresses in an IPv6 message", netlinkMsg(ctType(ipctnlMsgCTDelete), 0, append([]byte{unix.AF_INET6, 0, 0, 0}, tuples...)), errMalformed},
	{"short mark", newMsg(tuples, attr(nfnl.CTAMark, 1, 2)), errMalformed},
	{"short id", newMsg(tuples, attr(nfnl.CTAID, 1, 2, 3)), errMalformed},
	{"long zone", newMsg(tuples, attr(nfnl.CTAZone, 0, 0, 0, 1)), errMalformed},
	{"long status", newMsg(tuples, attr(nfnl.CTAStatus, make([]byte, 8)...)), errMalformed},
	{"short counter", newMsg(tuples, nest(nfnl.CTACountersOrig, attr(ctaCountersPackets, 0, 0, 0, 1))), errMalformed},
	{"short tuple zone", withOrig(ip4, proto(17, 1, 2), attr(nfnl.CTATupleZone, 1)), errMalformed},
	{"attribute longer than the message", newMsg(tuples, []byte{0xff, 0xff, 1, 0}), errMalformed},
	{"attribute shorter than its header", newMsg(tuples, []byte{0, 0, 1, 0}), errMalformed},
	{"attribute cut off", newMsg(tuples, []byte{8, 0}), errMalformed},
	{"message shorter than its header", append([]byte{8, 0, 0, 8}, make([]byte, 20)...), errMalformed},
	{"message length of all ones", bytes.Repeat([]byte{0xff}, 64), errMalformed},
}

func TestParseRefusesOddMessages(t *testing.T) {
	for _, tt := range oddMessages {
		t.Run(tt.name, func(t *testing.T) {
			var f cone.Flow
			if _, err := parseOne(tt.msg, &f); err != tt.want {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

func TestParseNeverReadsPastACutMessage(t *testing.T) {
	b := goldenBytes(t, golden[len(golden)-1].hex)
	var f cone.Flow
	for n := range b {
		if _, err := parseOne(b[:n], &f); err != errMalformed {
			t.Fatalf("%d of %d bytes: error %v", n, len(b), err)
		}
	}
}

func TestParseReadsCountersOf32Bits(t *testing.T) {
	var f cone.Flow
	_, err := parseOne(newMsg(tuples,
		nest(nfnl.CTACountersOrig, attr(ctaCounters32Packets, 0, 0, 1, 0)),
		nest(nfnl.CTACountersReply, attr(ctaCounters32Packets, 0, 0, 0, 5))), &f)
	if err != nil || !f.HasCounters || f.OrigPackets != 256 || f.ReplyPackets != 5 {
		t.Errorf("%v, counters %v: %d and %d", err, f.HasCounters, f.OrigPackets, f.ReplyPackets)
	}
}

func TestParseDoesNotAllocate(t *testing.T) {
	for _, tt := range golden {
		b := goldenBytes(t, tt.hex)
		var f cone.Flow
		if n := testing.AllocsPerRun(100, func() { _, _ = parseOne(b, &f) }); n != 0 {
			t.Errorf("%s: %v allocations", tt.name, n)
		}
	}
}

// BenchmarkDecoders compares the decoder of the event path with ti-mo's, which is the
// reference: what an event costs after it was read (docs/adr/0003-own-decoder.md).
func BenchmarkDecoders(b *testing.B) {
	msg := goldenBytes(b, golden[0].hex)
	b.Run("ours", func(b *testing.B) {
		b.ReportAllocs()
		var f cone.Flow
		for b.Loop() {
			if _, err := parseOne(msg, &f); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("ti-mo", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			var m netlink.Message
			var ev conntrack.Event
			if err := m.UnmarshalBinary(msg); err != nil {
				b.Fatal(err)
			}
			if err := ev.Unmarshal(m); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// compareWithReference compares what we decoded with ti-mo's decoder. If that refuses a
// message (it fails on unknown attributes) there is nothing to compare, unless mustDecode
// is set.
func compareWithReference(t *testing.T, b []byte, kind Kind, got cone.Flow, mustDecode bool) {
	t.Helper()
	var m netlink.Message
	var ev conntrack.Event
	err := m.UnmarshalBinary(b)
	if err == nil {
		err = ev.Unmarshal(m)
	}
	if err != nil {
		if mustDecode {
			t.Errorf("reference decoder: %v", err)
		}
		return
	}
	if ev.Flow == nil {
		t.Fatal("the reference decoder sees no flow")
	}
	if want := map[Kind]string{New: "EventNew", Gone: "EventDestroy"}[kind]; ev.Type.String() != want {
		t.Errorf("kind %v, the reference decoder says %v", kind, ev.Type)
	}
	want := referenceFlow(ev.Flow)
	want.Began = kind == New && !want.Status.Has(cone.StatusSeenReply)
	want.HasCounters = got.HasCounters // it does not tell zero from absent
	want.Helped = got.Helped           // nor a name from none
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-reference +ours)\n%s", diff)
	}
}

// hasWideTypes reports attribute types above 255, of which the reference
// decoder looks at the low byte alone.
func hasWideTypes(attrs []byte) (wide bool) {
	nfnl.EachAttribute(attrs, func(typ uint16, val []byte) bool {
		wide = typ > 255 || hasWideTypes(val)
		return !wide
	})
	return wide
}

func referenceFlow(r *conntrack.Flow) cone.Flow {
	ends := func(tu conntrack.Tuple) (src, dst cone.Endpoint) {
		if tu.Proto.Protocol == 0 {
			return src, dst // no such tuple
		}
		return cone.Endpoint{Addr: cone.AddrFrom(tu.IP.SourceAddress), Port: tu.Proto.SourcePort},
			cone.Endpoint{Addr: cone.AddrFrom(tu.IP.DestinationAddress), Port: tu.Proto.DestinationPort}
	}
	zone := func(one uint16) uint16 {
		if one != 0 {
			return one
		}
		return r.Zone
	}
	f := cone.Flow{
		ID: r.ID, Mark: r.Mark, Status: cone.Status(r.Status),
		OrigZone: zone(r.TupleOrig.Zone), ReplyZone: zone(r.TupleReply.Zone),
		OrigPackets: r.CountersOrig.Packets, ReplyPackets: r.CountersReply.Packets,
		Left:     time.Duration(r.Timeout) * time.Second,
		Labelled: nfnl.HasChildLabel(r.Labels) && zone(r.TupleOrig.Zone) == 0,
	}
	f.Src, f.Dst = ends(r.TupleOrig)
	f.ReplySrc, f.ReplyDst = ends(r.TupleReply)
	f.MasterSrc, f.MasterDst = ends(r.TupleMaster)
	return f
}

// Other programs that label flows use other bits, and may have labelled one of our
// children.
func TestLabelOfAChildIsOneBit(t *testing.T) {
	ours, others := nfnl.ChildLabel, [16]byte{1: 0xff, 7: 0x80}
	both := ours
	for i := range both {
		both[i] |= others[i]
	}
	for name, tc := range map[string]struct {
		labels []byte
		want   bool
	}{
		"ours": {ours[:], true}, "others'": {others[:], false}, "both": {both[:], true},
		"none": {make([]byte, 16), false}, "too short": {ours[:8], false}, "too long": {append(ours[:], 0), false},
	} {
		var f cone.Flow
		if _, err := parseOne(newMsg(tuples, attr(nfnl.CTALabels, tc.labels...), attr(nfnl.CTAZone, 0, 7)), &f); err != nil || f.Labelled {
			t.Errorf("%s, in a zone: labelled %v, %v", name, f.Labelled, err)
		}
		if _, err := parseOne(newMsg(tuples, attr(nfnl.CTALabels, tc.labels...)), &f); err != nil || f.Labelled != tc.want {
			t.Errorf("%s: labelled %v, %v", name, f.Labelled, err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, tt := range golden {
		f.Add(goldenBytes(f, tt.hex))
	}
	for _, tt := range oddMessages {
		f.Add(tt.msg)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		var flow cone.Flow
		for rest := b; len(rest) > 0; {
			h, msg, next, ok := nfnl.NextMessage(rest)
			if !ok {
				break
			}
			rest = next
			if kind, err := parse(h, msg, &flow); err == nil && !hasWideTypes(msg[unix.NLMSG_HDRLEN+nfnl.FamilyHeaderLen:]) {
				compareWithReference(t, msg, kind, flow, false)
			}
		}
	})
}

func BenchmarkParse(b *testing.B) {
	msg := goldenBytes(b, golden[0].hex)
	var f cone.Flow
	b.ReportAllocs()
	for b.Loop() {
		if _, err := parseOne(msg, &f); err != nil {
			b.Fatal(err)
		}
	}
}
