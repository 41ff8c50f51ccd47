package elements

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

// message is the body of dumps of both maps: the elements of listed as we send them, and
// those of the next peer with key and value in another order and with unknown attributes.
func message() []byte {
	m := NewMap(NewWriter(nil, 0, "conenat"), MapConfig{Lifetime: time.Minute})
	var body []byte
	for _, set := range []string{PermissionMap, PortMap} {
		m.enc.Reset()
		m.element(1, unix.NFT_MSG_NEWSETELEM, set, &listed)
		b := m.enc.B[unix.NLMSG_HDRLEN:]
		if len(body) > 0 {
			b = b[nfnl.FamilyHeaderLen:] // all in one message
		}
		body = append(body, b...)
	}
	var e nfnl.Encoder
	list := e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	for _, value := range [][]byte{{10, 47, 11, 109}, {0x13, 0xc6}} {
		element := e.Nest(unix.NFTA_LIST_ELEM)
		e.BE64(unix.NFTA_SET_ELEM_EXPIRATION, 1500)
		e.Str(77, "of a later kernel")
		data := e.Nest(unix.NFTA_SET_ELEM_DATA)
		e.Attr(unix.NFTA_DATA_VALUE, len(value))
		e.B = append(e.B, value...)
		e.Pad()
		e.EndNest(data)
		key := e.Nest(unix.NFTA_SET_ELEM_KEY)
		e.Attr(unix.NFTA_DATA_VALUE, keyLen)
		e.B = append(e.B, 203, 0, 113, 6, 198, 51, 100, 1, 0x13, 0xc4, 0, 0)
		e.EndNest(key)
		e.EndNest(element)
	}
	e.EndNest(list)
	return append(body, e.B...)
}

// parse returns the permissions in the bodies of dumps, with the times they have left.
func parse(b []byte) map[cone.Permission]time.Duration {
	var found halves
	eachElement(b, found.add)
	all := map[cone.Permission]time.Duration{}
	found.each(func(p cone.Permission, left time.Duration) { all[p] = left })
	return all
}

func TestElementsAreReadAsTheyAreWritten(t *testing.T) {
	next := listed
	next.Peer = listed.Peer.Plus(1)
	all := parse(message())
	_, ok := all[listed]
	if left := all[next]; !ok || left != 1500*time.Millisecond || len(all) != 2 {
		t.Errorf("%v", all)
	}
}

func TestPermissionTakesBothHalves(t *testing.T) {
	m := NewMap(NewWriter(nil, 0, "conenat"), MapConfig{Lifetime: time.Minute})
	for _, set := range []string{PermissionMap, PortMap} {
		m.enc.Reset()
		m.element(1, unix.NFT_MSG_NEWSETELEM, set, &listed)
		if all := parse(m.enc.B[unix.NLMSG_HDRLEN:]); len(all) > 0 {
			t.Errorf("from %s alone: %v", set, all)
		}
	}
}

func FuzzParseElements(f *testing.F) {
	f.Add(message())
	f.Add(message()[:40])
	f.Fuzz(func(t *testing.T, b []byte) {
		for p := range parse(b) {
			if !p.Ext.Addr.Is4() || !p.Peer.Is4() || !p.Int.Addr.Is4() {
				t.Errorf("not IPv4: %v", p)
			}
		}
	})
}
