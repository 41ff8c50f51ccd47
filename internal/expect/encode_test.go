package expect

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

func perm(ext, in, peer string) cone.Permission {
	return cone.Permission{
		Key: cone.Key{
			Ext:  cone.EndpointFrom(netip.MustParseAddrPort(ext)),
			Peer: cone.AddrFrom(netip.MustParseAddr(peer)),
		},
		Int: cone.EndpointFrom(netip.MustParseAddrPort(in)),
	}
}

var (
	seed   = perm("198.51.100.1:5060", "10.47.11.109:5062", "203.0.113.5")
	routed = perm("[2001:db8:47::109]:5060", "[2001:db8:47::109]:5060", "2001:db8:5::5")
	zoned  = func() cone.Permission { p := seed; p.Zone = 7; return p }()
)

// tree prints messages as text that names each attribute by its path of
// numbers, so that all bytes but paddings are seen.
func tree(t *testing.T, b []byte) []string {
	t.Helper()
	var out []string
	for len(b) > 0 {
		h := binary.NativeEndian.Uint32(b)
		typ, flags := binary.NativeEndian.Uint16(b[4:]), binary.NativeEndian.Uint16(b[6:])
		line := fmt.Sprintf("%d/%d %x seq %d family %d:", typ>>8, typ&0xff, flags, binary.NativeEndian.Uint32(b[8:]), b[16])
		out = append(out, line+attrs(t, b[nfnl.HeaderLen:h]))
		b = b[h:]
	}
	return out
}

func attrs(t *testing.T, b []byte) string {
	t.Helper()
	all, err := netlink.UnmarshalAttributes(b)
	if err != nil {
		t.Fatalf("%v in %x", err, b)
	}
	var s strings.Builder
	for _, a := range all {
		typ := a.Type &^ unix.NLA_F_NESTED
		if a.Type&unix.NLA_F_NESTED != 0 {
			fmt.Fprintf(&s, " %d{%s}", typ, attrs(t, a.Data)[1:])
		} else {
			fmt.Fprintf(&s, " %d=%x", typ, a.Data)
		}
	}
	return s.String()
}

// Legend: subsystem 1 is conntrack with 1 tuple, 2 reply tuple, 3 status,
// 5 help, 7 timeout, 8 mark, 18 zone; subsystem 2 is expectations with
// 1 master, 2 tuple, 3 mask, 4 timeout, 7 zone, 8 flags, 10 NAT, 11 function. A
// tuple is 1{addresses: 1, 2 of IPv4, 3, 4 of IPv6} 2{1 protocol 2 source port
// 3 destination port}. Messages are 0 new, 1 get, 2 delete; their flags follow.
func TestEncoder(t *testing.T) {
	const (
		in4   = "0a2f0b6d"                         // 10.47.11.109
		ext4  = "c6336401"                         // 198.51.100.1
		peer4 = "cb007105"                         // 203.0.113.5
		in6   = "20010db8004700000000000000000109" // 2001:db8:47::109
		peer6 = "20010db8000500000000000000000005" // 2001:db8:5::5
		ones4 = "ffffffff"
		ones6 = "ffffffffffffffffffffffffffffffff"
	)
	tuple4 := func(typ int, src, dst, sport, dport string) string {
		return fmt.Sprintf("%d{1{1=%s 2=%s} 2{1=11 2=%s 3=%s}}", typ, src, dst, sport, dport)
	}
	tuple6 := func(typ int, src, dst, sport, dport string) string {
		return fmt.Sprintf("%d{1{3=%s 4=%s} 2{1=11 2=%s 3=%s}}", typ, src, dst, sport, dport)
	}
	marked := seed
	marked.Mark = 0x11223344
	const (
		isNew    = "601" // REQUEST, CREATE, EXCL
		isChange = "1"   // REQUEST
	)
	plain := func(p cone.Permission) anchor { return anchorOf(&p, false) }
	flipped := func(p cone.Permission) anchor { return anchorOf(&p, true) }

	for _, tt := range []struct {
		name   string
		encode func(e *encoder)
		want   []string
	}{
		{"anchor", func(e *encoder) { e.newAnchor(5, &seed, plain(seed), "RAS", 360) }, []string{
			"1/0 " + isNew + " seq 5 family 2: " + tuple4(1, in4, peer4, "0000", "13c4") + " " + tuple4(2, peer4, in4, "13c4", "0000") +
				" 3=0000000c 7=00000168 5{1=52415300}",
		}},
		{"flipped anchor with a mark", func(e *encoder) { e.newAnchor(5, &marked, flipped(marked), "RAS", 360) }, []string{
			"1/0 " + isNew + " seq 5 family 2: " + tuple4(1, in4, peer4, "13c4", "0000") + " " + tuple4(2, peer4, in4, "0000", "13c4") +
				" 3=0000000c 7=00000168 8=11223344 5{1=52415300}",
		}},
		{"anchor in a zone", func(e *encoder) { e.newAnchor(5, &zoned, plain(zoned), "RAS", 360) }, []string{
			"1/0 " + isNew + " seq 5 family 2: " + tuple4(1, in4, peer4, "0000", "13c4") + " " + tuple4(2, peer4, in4, "13c4", "0000") +
				" 3=0000000c 7=00000168 5{1=52415300} 18=0007",
		}},
		{"anchor of IPv6", func(e *encoder) { e.newAnchor(5, &routed, plain(routed), "RAS", 360) }, []string{
			"1/0 " + isNew + " seq 5 family 10: " + tuple6(1, in6, peer6, "0000", "13c4") + " " + tuple6(2, peer6, in6, "13c4", "0000") +
				" 3=0000000c 7=00000168 5{1=52415300}",
		}},
		{"expectation with translation", func(e *encoder) { e.newExpect(6, &seed, plain(seed)) }, []string{
			"2/0 " + isNew + " seq 6 family 2: " + tuple4(1, in4, peer4, "0000", "13c4") + " " + tuple4(2, peer4, ext4, "0000", "13c4") +
				" " + tuple4(3, ones4, ones4, "0000", "ffff") + " 8=00000001" +
				" 10{1=00000001 " + tuple4(2, in4, "00000000", "13c6", "0000") + "} 11=" + hex.EncodeToString([]byte("nat-follow-master\x00")),
		}},
		{"routed expectation of IPv6", func(e *encoder) { e.newExpect(6, &routed, plain(routed)) }, []string{
			"2/0 " + isNew + " seq 6 family 10: " + tuple6(1, in6, peer6, "0000", "13c4") + " " + tuple6(2, peer6, in6, "0000", "13c4") +
				" " + tuple6(3, ones6, ones6, "0000", "ffff") + " 8=00000001",
		}},
		{"expectation in a zone, on a flipped anchor, renewed", func(e *encoder) { e.renewExpect(7, &zoned, flipped(zoned), 300) }, []string{
			"2/0 " + isChange + " seq 7 family 2: " + tuple4(1, in4, peer4, "13c4", "0000") + " " + tuple4(2, peer4, ext4, "0000", "13c4") +
				" " + tuple4(3, ones4, ones4, "0000", "ffff") + " 7=0007 4=0000012c",
		}},
		{"anchor renewed", func(e *encoder) { e.renewAnchor(7, &zoned, plain(zoned), "RAS", 360) }, []string{
			"1/0 " + isChange + " seq 7 family 2: " + tuple4(1, in4, peer4, "0000", "13c4") + " 7=00000168 8=00000000 5{1=52415300} 18=0007",
		}},
		{"one of each to find and to delete", func(e *encoder) {
			e.getExpect(1, &zoned.Key)
			e.deleteExpect(2, &seed.Key)
			e.deleteAnchor(3, plain(seed))
			e.deleteExpect(4, &routed.Key)
			e.deleteAnchor(5, flipped(zoned))
			e.deleteAnchor(6, flipped(routed))
		}, []string{
			"2/1 " + isChange + " seq 1 family 2: " + tuple4(2, peer4, ext4, "0000", "13c4") + " 7=0007",
			"2/2 " + isChange + " seq 2 family 2: " + tuple4(2, peer4, ext4, "0000", "13c4"),
			"1/2 " + isChange + " seq 3 family 2: " + tuple4(1, in4, peer4, "0000", "13c4"),
			"2/2 " + isChange + " seq 4 family 10: " + tuple6(2, peer6, in6, "0000", "13c4"),
			"1/2 " + isChange + " seq 5 family 2: " + tuple4(1, in4, peer4, "13c4", "0000") + " 18=0007",
			"1/2 " + isChange + " seq 6 family 10: " + tuple6(1, in6, peer6, "13c4", "0000"),
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var e encoder
			tt.encode(&e)
			if diff := cmp.Diff(tt.want, tree(t, e.B)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestEncoderBytes(t *testing.T) {
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		t.Skip("the golden bytes are those of a little-endian machine")
	}
	for name, tt := range map[string]struct {
		encode func(e *encoder)
		golden string
	}{
		"anchor": {func(e *encoder) { e.newAnchor(5, &zoned, anchorOf(&zoned, false), "RAS", 360) }, `
			a0000000 0001 0106 05000000 00000000 // 160 bytes, CT_NEW, REQUEST CREATE EXCL, sequence 5
			02 00 0000                           // AF_INET, version 0
			3400 0180                            // CTA_TUPLE_ORIG
			  1400 0180                          //   CTA_TUPLE_IP
			    0800 0100 0a2f0b6d               //     source 10.47.11.109
			    0800 0200 cb007105               //     destination 203.0.113.5
			  1c00 0280                          //   CTA_TUPLE_PROTO
			    0500 0100 11000000               //     UDP
			    0600 0200 00000000               //     source port 0
			    0600 0300 13c40000               //     destination port 5060
			3400 0280                            // CTA_TUPLE_REPLY
			  1400 0180
			    0800 0100 cb007105
			    0800 0200 0a2f0b6d
			  1c00 0280
			    0500 0100 11000000
			    0600 0200 13c40000
			    0600 0300 00000000
			0800 0300 0000000c                   // CTA_STATUS: CONFIRMED ASSURED
			0800 0700 00000168                   // CTA_TIMEOUT: 360 s
			0c00 0580                            // CTA_HELP
			  0800 0100 52415300                 //   CTA_HELP_NAME: RAS, with its NUL
			0600 1200 00070000                   // CTA_ZONE: 7`},
		"expectation": {func(e *encoder) { e.newExpect(6, &seed, anchorOf(&seed, false)) }, `
			10010000 0002 0106 06000000 00000000 // 272 bytes, EXP_NEW, REQUEST CREATE EXCL, sequence 6
			02 00 0000
			3400 0180                            // CTA_EXPECT_MASTER: the anchor
			  1400 0180 0800 0100 0a2f0b6d 0800 0200 cb007105
			  1c00 0280 0500 0100 11000000 0600 0200 00000000 0600 0300 13c40000
			3400 0280                            // CTA_EXPECT_TUPLE
			  1400 0180
			    0800 0100 cb007105               //     from 203.0.113.5
			    0800 0200 c6336401               //     to 198.51.100.1
			  1c00 0280
			    0500 0100 11000000
			    0600 0200 00000000
			    0600 0300 13c40000               //     port 5060
			3400 0380                            // CTA_EXPECT_MASK
			  1400 0180 0800 0100 ffffffff 0800 0200 ffffffff
			  1c00 0280 0500 0100 11000000
			    0600 0200 00000000               //     from any port
			    0600 0300 ffff0000
			0800 0800 00000001                   // CTA_EXPECT_FLAGS: PERMANENT
			4000 0a80                            // CTA_EXPECT_NAT
			  0800 0100 00000001                 //   reply direction
			  3400 0280
			    1400 0180
			      0800 0100 0a2f0b6d             //       to 10.47.11.109, as the source
			      0800 0200 00000000
			    1c00 0280
			      0500 0100 11000000
			      0600 0200 13c60000             //       port 5062
			      0600 0300 00000000
			1600 0b00 6e61742d666f6c6c6f772d6d6173746572 00 0000 // CTA_EXPECT_FN, with its NUL`},
	} {
		t.Run(name, func(t *testing.T) {
			var e encoder
			tt.encode(&e)
			got, want := hex.EncodeToString(e.B), compact(tt.golden)
			if got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		})
	}
}

// compact takes comments and blanks out of hexadecimal text.
func compact(s string) string {
	var out strings.Builder
	for line := range strings.Lines(s) {
		code, _, _ := strings.Cut(line, "//")
		out.WriteString(strings.Join(strings.Fields(code), ""))
	}
	return out.String()
}

// A delete without a tuple flushes the whole table.
func TestDeleteAlwaysCarriesATuple(t *testing.T) {
	var zero cone.Permission
	for _, p := range []cone.Permission{seed, routed, zoned, zero} {
		for _, flip := range []bool{false, true} {
			var e encoder
			e.deleteExpect(1, &p.Key)
			e.deleteAnchor(2, anchorOf(&p, flip))
			for b := e.B; len(b) > 0; {
				n := binary.NativeEndian.Uint32(b)
				all, err := netlink.UnmarshalAttributes(b[nfnl.HeaderLen:n])
				if err != nil {
					t.Fatal(err)
				}
				want := uint16(nfnl.CTATupleOrig)
				if binary.NativeEndian.Uint16(b[4:])>>8 == subsysExpect {
					want = ctaExpectTuple
				}
				tuple := all[0]
				if tuple.Type != want|unix.NLA_F_NESTED || len(tuple.Data) < 40 {
					t.Errorf("the first attribute of a delete is %d with %d bytes", tuple.Type, len(tuple.Data))
				}
				b = b[n:]
			}
		}
	}
}
