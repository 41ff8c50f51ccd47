package userrules

import (
	"encoding/binary"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Who replaces his rules first deletes them: what a set will contain is unknown then.
//
// Fails when a set that does not exist counts as one that lacks an element.
func TestSetThatIsGoneSaysNothing(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: "table inet marks { set fast { type ipv4_addr; flags timeout; elements = { 203.0.113.5 timeout 1h }; }; }\n"})
	var m Members
	var err error
	if m.c, err = nfnl.Dial(l.Gateway.FD()); err != nil {
		t.Fatal(err)
	}
	marks := &table{family: unix.NFPROTO_INET, name: "marks"}
	ask := func(addr byte, wantFound, wantKnown bool) {
		t.Helper()
		if _, found, known := m.value(marks, "fast", []byte{203, 0, 113, addr}); found != wantFound || known != wantKnown {
			t.Errorf("203.0.113.%d: found %v, known %v", addr, found, known)
		}
	}
	ask(5, true, true)
	ask(6, false, true)
	if err := l.NFT("delete set inet marks fast"); err != nil {
		t.Fatal(err)
	}
	ask(5, false, false)
	if err := l.NFT("delete table inet marks"); err != nil {
		t.Fatal(err)
	}
	ask(5, false, false)
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// Fails when a set that is deleted and made again between two questions counts as one that lacks an
// element which it had before, and has again.
func TestSetThatIsReplacedWhileItIsAskedLacksNothing(t *testing.T) {
	const with = "table inet marks { set fast { type ipv4_addr; flags timeout; elements = { 203.0.113.5 timeout 1h }; }; }\n"
	l := lab.ForTest(t, lab.Options{Rules: with})
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	raw, err := nl.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	nft := func(rules string) {
		if err := l.NFT(rules); err != nil {
			t.Error(err)
		}
	}
	elements, sets := 0, 0
	var m Members
	m.c, err = nfnl.OverFake(nl, func(b []byte) {
		switch binary.NativeEndian.Uint16(b[4:]) & 0xff {
		case unix.NFT_MSG_GETSETELEM:
			if elements++; elements == 1 {
				nft("delete table inet marks")
			}
		case unix.NFT_MSG_GETSET:
			if sets++; sets == 1 {
				nft(with)
			}
		}
		if err := raw.Control(func(fd uintptr) { _, err = unix.Write(int(fd), b) }); err != nil {
			t.Error(err)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, found, known := m.value(&table{family: unix.NFPROTO_INET, name: "marks"}, "fast", []byte{203, 0, 113, 5}); !found || !known {
		t.Errorf("found %v, known %v", found, known)
	}
	if sets == 0 {
		t.Error("the set was not replaced between two questions")
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}
