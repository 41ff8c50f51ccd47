//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

var listed = cone.Permission{
	Key: cone.Key{
		Ext:  cone.Endpoint{Addr: cone.AddrFrom4([4]byte{198, 51, 100, 1}), Port: 5060},
		Peer: cone.AddrFrom4([4]byte{203, 0, 113, 5}),
	},
	Int: cone.Endpoint{Addr: cone.AddrFrom4([4]byte{10, 47, 11, 109}), Port: 5062},
}

// message is the body of a dump with two elements: the first as we send it, the
// second with its key and value in another order, and what we do not know.
func message() []byte {
	m := Map{table: "conenat", children: 256}
	m.element(1, unix.NFT_MSG_NEWSETELEM, permissionMap, &listed, true, time.Minute)
	var e nfnl.Encoder
	list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	element := e.Nest(unix.NFTA_LIST_ELEM)
	e.BE64(unix.NFTA_SET_ELEM_EXPIRATION, 1500)
	e.Str(77, "of a later kernel")
	data := e.Nest(unix.NFTA_SET_ELEM_DATA)
	e.Attr(unix.NFTA_DATA_VALUE, valueLen)
	e.B = append(e.B, 10, 47, 11, 109, 0x13, 0xc6, 0, 0)
	e.EndNest(data)
	key := e.Nest(unix.NFTA_SET_ELEM_KEY)
	e.Attr(unix.NFTA_DATA_VALUE, keyLen)
	e.B = append(e.B, 203, 0, 113, 5, 198, 51, 100, 1, 0x13, 0xc4, 0, 0)
	e.EndNest(key)
	e.EndNest(element)
	e.EndNest(list)
	return append(m.enc.B[unix.NLMSG_HDRLEN:], e.B...)
}

func TestElementsAreReadAsTheyAreWritten(t *testing.T) {
	var n int
	parseElements(message(), func(p cone.Permission, left time.Duration) {
		if n++; n == 2 && left != 1500*time.Millisecond {
			t.Errorf("%v left", left)
		}
		if p != listed {
			t.Errorf("%v, want %v", p, listed)
		}
	})
	if n != 2 {
		t.Errorf("%d elements, want 2", n)
	}
}

func FuzzParseElements(f *testing.F) {
	f.Add(message())
	f.Add(message()[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		parseElements(b, func(p cone.Permission, _ time.Duration) {
			if !p.Ext.Addr.Is4() || !p.Peer.Is4() || !p.Int.Addr.Is4() {
				t.Errorf("not IPv4: %v", p)
			}
		})
	})
}
