package userrules

import (
	"testing"

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
