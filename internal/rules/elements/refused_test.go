package elements

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// Fails when every refusal is taken for a missing element.
func TestOnlyWhatTheKernelDoesNotFindIsMissing(t *testing.T) {
	for errno, want := range map[unix.Errno]int{unix.ENOENT: 1, unix.ENOMEM: 0} {
		c, kernel := nfnltest.New(t)
		kernel.Answer = nfnltest.RefuseAll(errno)
		m := NewMap(NewWriter(c, 0, "conenat"), MapConfig{})
		missing := 0
		err := m.Missing(make([]cone.Permission, 1), func(int) { missing++ })
		if missing != want || (want == 0) != errors.Is(err, errno) {
			t.Errorf("%v: %d missing, want %d; %v", errno, missing, want, err)
		}
	}
}

// Fails when a mark that the kernel does not renew goes unreported.
func TestPermissionWithoutItsMarkIsLost(t *testing.T) {
	c, kernel := nfnltest.New(t)
	kernel.Answer = func(sent []nfnltest.Request) (out [][]byte) {
		for _, r := range sent {
			switch {
			case bytes.Contains(r.Body, []byte(MarksMap+"\x00")):
				out = append(out, nfnltest.Says(r.Seq, unix.ENFILE))
			case r.Flags&unix.NLM_F_ACK != 0:
				out = append(out, nfnltest.Says(r.Seq, 0))
			}
		}
		return out
	}
	m := NewMap(NewWriter(c, 0, "conenat"), MapConfig{})
	ps := make([]cone.Permission, 3)
	for i := range ps {
		ps[i].Ext.Port = uint16(i)
	}
	ps[1].Mark = 7
	var lost []int
	m.Renew(ps, func(i int) { lost = append(lost, i) })
	if !slices.Equal(lost, []int{1}) {
		t.Errorf("lost are %v, want that with a mark", lost)
	}
}

// Fails when a revocation deletes elements that are not there, so that the kernel aborts the
// transaction and lets the loop wait.
func TestRevocationDeletesOnlyWhatIsThere(t *testing.T) {
	for name, there := range map[string]bool{"nothing is there": false, "all is there": true} {
		t.Run(name, func(t *testing.T) {
			c, kernel := nfnltest.New(t)
			deletes := 0
			kernel.Answer = func(sent []nfnltest.Request) (out [][]byte) {
				for _, r := range sent {
					switch typ := r.Type & 0xff; {
					case typ == unix.NFT_MSG_GETSETELEM && !there:
						out = append(out, nfnltest.Says(r.Seq, unix.ENOENT))
						continue
					case typ == unix.NFT_MSG_DELSETELEM:
						deletes++
					}
					if r.Flags&unix.NLM_F_ACK != 0 {
						out = append(out, nfnltest.Says(r.Seq, 0))
					}
				}
				return out
			}
			m := NewMap(NewWriter(c, 0, "conenat"), MapConfig{})
			ps := make([]cone.Permission, 2)
			ps[1].Ext.Port, ps[1].Mark = 5060, 7
			if err := m.Revoke(ps); err != nil {
				t.Error(err)
			}
			if want := map[bool]int{true: 5}[there]; deletes != want { // two addresses, two ports, a mark
				t.Errorf("%d deletions, want %d", deletes, want)
			}
		})
	}
}
