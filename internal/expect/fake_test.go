package expect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// An answer to an abandoned look-up must not be taken for the answer to the next one.
func TestLateAnswersAreSkipped(t *testing.T) {
	c, k := nfnltest.New(t)
	c.Timeout = 10 * time.Millisecond
	c.NextSeq(-2) // the numbers wrap on the way
	x := nfnltest.Message(subsysExpect<<8|msgNew, 0, goldenExpectation)
	var late nfnltest.Request
	k.Answer = func(sent []nfnltest.Request) [][]byte { late = sent[0]; return nil }
	var e encoder
	if _, _, err := get(c, &e, &seed.Key); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	k.Answer = func(sent []nfnltest.Request) [][]byte {
		binary.NativeEndian.PutUint32(x[8:], late.Seq)
		return [][]byte{x, nfnltest.Says(late.Seq, unix.EMFILE), nfnltest.Says(sent[0].Seq, unix.ENOENT)}
	}
	if x, found, err := get(c, &e, &seed.Key); found || err != nil {
		t.Errorf("found %v: %+v, error %v", found, x, err)
	}
}

// newFakeBackend returns a Backend with a helper on a fake kernel.
func newFakeBackend(t *testing.T) (*Backend, *nfnltest.Kernel) {
	t.Helper()
	c, k := nfnltest.New(t)
	c.Timeout = 10 * time.Millisecond
	b := newBackend(Config{Lifetime: time.Minute}, c)
	b.helpers.v4 = helper{"RAS", 60}
	return b, k
}

func many(n int) []cone.Permission {
	ps := make([]cone.Permission, n)
	for i := range ps {
		ps[i] = seed
		ps[i].Ext.Port += uint16(i)
	}
	return ps
}

// If it is unknown what the kernel did, permissions are neither assumed nor forgotten, and
// there are no more sends to a broken kernel than needed.
func TestGrantWithUnknownOutcome(t *testing.T) {
	b, k := newFakeBackend(t)
	b.SetMax(78)
	ps := many(80)
	sends := 0
	k.Answer = func([]nfnltest.Request) [][]byte { sends++; return nil }
	refused := map[int]cone.Reason{}
	b.Grant(ps, func(i int, r cone.Reason, _ error) {
		if _, twice := refused[i]; twice {
			t.Errorf("permission %d refused twice", i)
		}
		refused[i] = r
	})
	for i := range ps {
		want := cone.ReasonKernel
		if i >= 78 {
			want = cone.ReasonTableFull
		}
		if refused[i] != want {
			t.Errorf("permission %d refused for %q, want %q", i, refused[i], want)
		}
	}
	if sends > 4 {
		t.Errorf("%d sends to a broken kernel", sends)
	}
	if b.Standing() != 78 {
		t.Errorf("%d may stand", b.Standing())
	}

	k.Answer = nfnltest.Acknowledge
	if err := b.Revoke(ps); err != nil || b.Standing() != 0 {
		t.Errorf("Revoke: %v, %d stand", err, b.Standing())
	}
}

// Every message of a grant adds to the latency of a permission.
func TestGrantSendsNoMoreThanItMust(t *testing.T) {
	const (
		anchor = subsysConntrack << 8
		expect = subsysExpect << 8
	)
	for name, tt := range map[string]struct {
		p      cone.Permission
		helper helper
		want   []uint16 // types of message
	}{
		"helper's timeout suits":         {seed, helper{"RAS", 60}, []uint16{anchor, expect}},
		"helper's timeout does not suit": {seed, helper{"RAS", 240}, []uint16{anchor, expect, expect}},
		"no helper for this family":      {routed, helper{"RAS", 60}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			b, k := newFakeBackend(t)
			b.helpers.v4 = tt.helper
			var got []uint16
			k.Answer = func(sent []nfnltest.Request) [][]byte {
				for _, r := range sent {
					got = append(got, r.Type)
				}
				return nfnltest.Acknowledge(sent)
			}
			b.Grant([]cone.Permission{tt.p}, func(_ int, r cone.Reason, err error) {
				if tt.want != nil || r != cone.ReasonKernel || !errors.Is(err, ErrNoHelper) {
					t.Errorf("refused for %v: %v", r, err)
				}
			})
			if !slices.Equal(got, tt.want) {
				t.Errorf("sent %x, want %x", got, tt.want)
			}
		})
	}
}

// After a failed send nothing is deleted for a permission of the batch that was refused,
// and so was not sent.
func TestFailedSendHarmsNoOther(t *testing.T) {
	b, k := newFakeBackend(t)
	b.SetMax(1)
	ps := many(2)
	b.Grant(ps[:1], func(int, cone.Reason, error) { t.Error("refused") })

	var deleted int
	k.Answer = func(sent []nfnltest.Request) [][]byte {
		for _, r := range sent {
			if r.Type&0xff == msgDelete {
				deleted++
			}
		}
		return nfnltest.RefuseAll(unix.ENOENT)(sent)
	}
	b.Grant(ps[1:], func(_ int, r cone.Reason, _ error) {
		if r != cone.ReasonTableFull {
			t.Errorf("refused for %v", r)
		}
	})
	if deleted != 0 || b.Standing() != 1 {
		t.Errorf("%d deletes, %d stand", deleted, b.Standing())
	}
}

func TestRevokeKeepsWhatTheKernelDidNotDelete(t *testing.T) {
	b, k := newFakeBackend(t)
	ps := many(3)
	b.Grant(ps, func(int, cone.Reason, error) { t.Error("refused") })
	for name, answer := range map[string]func([]nfnltest.Request) [][]byte{
		"silence": nfnltest.Silent, "refusal": nfnltest.RefuseAll(unix.EBUSY),
	} {
		k.Answer = answer
		if err := b.Revoke(ps); err == nil || b.Standing() != 3 {
			t.Errorf("%s: Revoke = %v, %d stand", name, err, b.Standing())
		}
	}
	k.Answer = nfnltest.RefuseAll(unix.ENOENT)
	if err := b.Revoke(ps); err != nil || b.Standing() != 0 {
		t.Errorf("Revoke = %v, %d stand", err, b.Standing())
	}
}

// Fails when what the kernel failed to remove counts for ever, because nobody asks for it again.
func TestWhatTheKernelDidNotRemoveIsRemovedLater(t *testing.T) {
	ps := many(3)
	full := func(sent []nfnltest.Request) [][]byte { // cannot make anything, and not remove it
		if sent[0].Type&0xff == msgGet {
			return nfnltest.RefuseAll(unix.ENOENT)(sent)
		}
		return nfnltest.RefuseAll(unix.ENOMEM)(sent)
	}
	for name, fail := range map[string]func(*Backend, *nfnltest.Kernel){
		"silence at a grant": func(b *Backend, k *nfnltest.Kernel) {
			k.Answer = nfnltest.Silent
			b.Grant(ps, func(int, cone.Reason, error) {})
		},
		"refusal of a grant": func(b *Backend, k *nfnltest.Kernel) {
			k.Answer = full
			b.Grant(ps, func(int, cone.Reason, error) {})
		},
		"silence at a revoke": func(b *Backend, k *nfnltest.Kernel) {
			b.Grant(ps, func(int, cone.Reason, error) { t.Error("refused") })
			k.Answer = nfnltest.Silent
			_ = b.Revoke(ps)
		},
		"refusal of a revoke": func(b *Backend, k *nfnltest.Kernel) {
			b.Grant(ps, func(int, cone.Reason, error) { t.Error("refused") })
			k.Answer = full
			_ = b.Revoke(ps)
		},
	} {
		for next, operation := range map[string]func(*Backend){
			"grant":  func(b *Backend) { b.Grant(nil, nil) },
			"revoke": func(b *Backend) { _ = b.Revoke(nil) },
			"renew":  func(b *Backend) { b.Renew(nil, nil) },
		} {
			t.Run(name+", then "+next, func(t *testing.T) {
				b, k := newFakeBackend(t)
				fail(b, k)
				if b.Standing() != len(ps) {
					t.Fatalf("%d may stand, want %d", b.Standing(), len(ps))
				}
				k.Answer = nfnltest.RefuseAll(unix.ENOENT)
				operation(b)
				if b.Standing() != 0 {
					t.Errorf("%d still count", b.Standing())
				}
			})
		}
	}
}

// Fails when a permission that is granted again after all is removed with what failed before.
func TestWhatIsGrantedAgainIsNotRemoved(t *testing.T) {
	b, k := newFakeBackend(t)
	k.Answer = nfnltest.Silent
	b.Grant(many(1), func(int, cone.Reason, error) {})
	k.Answer = func(sent []nfnltest.Request) [][]byte {
		if sent[0].Type&0xff == msgGet {
			return nil // so it is not removed before it is granted
		}
		return nfnltest.Acknowledge(sent)
	}
	b.Grant(many(1), func(_ int, r cone.Reason, err error) { t.Errorf("refused: %v, %v", r, err) })
	k.Answer = nfnltest.Acknowledge
	b.Renew(many(1), func(int) { t.Error("lost") })
	if b.Standing() != 1 {
		t.Errorf("%d stand", b.Standing())
	}
}

func TestReasonsOfTheKernel(t *testing.T) {
	for _, tt := range []struct {
		errs answers
		want cone.Reason
		text string
	}{
		{answers{1: unix.EMFILE, 2: unix.ENOENT}, cone.ReasonTableFull, "create expectation: too many open files"},
		{answers{unix.ENOMEM, unix.ENOENT, unix.ENOENT}, cone.ReasonTableFull, "create anchor: cannot allocate memory"},
		{answers{1: unix.EBUSY}, cone.ReasonHelper, "create expectation: device or resource busy"},
		{answers{2: unix.ETIME}, cone.ReasonKernel, "set timeout of expectation: timer expired"},
	} {
		if got := tt.errs.reason(&cone.Permission{}); got != tt.want || tt.errs.cause().Error() != tt.text {
			t.Errorf("%v: %v", tt.errs.cause(), got)
		}
	}
}

// The kernel ends the expectations of a helper that is unregistered.
func TestCloseKeepsOurHelperWhilePermissionsStand(t *testing.T) {
	for _, stands := range []bool{true, false} {
		t.Run(fmt.Sprint(stands), func(t *testing.T) {
			b, k := newFakeBackend(t)
			b.helpers.own = "conenat-1234567"
			b.helpers.v4.name = b.helpers.own
			if stands {
				b.Grant(many(1), func(int, cone.Reason, error) { t.Error("refused") })
			}
			var got []uint16
			k.Answer = func(sent []nfnltest.Request) [][]byte {
				for _, r := range sent {
					got = append(got, r.Type)
				}
				return nfnltest.Acknowledge(sent)
			}
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			var want []uint16
			if !stands {
				want = []uint16{subsysHelper<<8 | msgDelete}
			}
			if !slices.Equal(got, want) {
				t.Errorf("sent %x, want %x", got, want)
			}
		})
	}
}
