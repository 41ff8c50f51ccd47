package expect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A request is the header of a message that the fake kernel got.
type request struct {
	typ, flags uint16
	seq        uint32
	body       []byte
}

// A fakeKernel answers each send with what answer returns, a datagram each.
type fakeKernel struct {
	*os.File // the near end
	answer   func(sent []request) [][]byte
}

// newFakeKernel returns a connection to a fakeKernel that does everything. Like
// the real one it answers before the send returns.
func newFakeKernel(t *testing.T) (*conn, *fakeKernel) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	k := &fakeKernel{File: near, answer: acknowledge}
	c := newConn(netlink.NewConn(k, 1))
	if c.raw, err = near.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	c.sendFn = func(uintptr) bool {
		c.err = nil
		for _, b := range k.answer(requests(c.out)) {
			if _, err := far.Write(b); err != nil {
				t.Error(err)
			}
		}
		return true
	}
	return c, k
}

// What conn does not use.
func (*fakeKernel) Send(netlink.Message) error                     { return errors.ErrUnsupported }
func (*fakeKernel) SendMessages([]netlink.Message) error           { return errors.ErrUnsupported }
func (*fakeKernel) Receive() ([]netlink.Message, error)            { return nil, errors.ErrUnsupported }
func (*fakeKernel) ReceiveIter() iter.Seq2[netlink.Message, error] { return nil }

func requests(b []byte) (all []request) {
	for len(b) > 0 {
		n := binary.NativeEndian.Uint32(b)
		all = append(all, request{
			typ: binary.NativeEndian.Uint16(b[4:]), flags: binary.NativeEndian.Uint16(b[6:]),
			seq: binary.NativeEndian.Uint32(b[8:]), body: slices.Clone(b[unix.NLMSG_HDRLEN:n]),
		})
		b = b[n:]
	}
	return all
}

func message(typ uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

// says is the answer of the kernel to message seq; errno 0 acknowledges.
func says(seq uint32, errno unix.Errno) []byte {
	return message(unix.NLMSG_ERROR, seq, binary.NativeEndian.AppendUint32(nil, -uint32(errno)))
}

// acknowledge is what a kernel says that did everything.
func acknowledge(sent []request) [][]byte { return [][]byte{says(sent[len(sent)-1].seq, 0)} }

// refuseAll is what a kernel says that does nothing.
func refuseAll(errno unix.Errno) func(sent []request) [][]byte {
	return func(sent []request) (out [][]byte) {
		for _, r := range sent {
			out = append(out, says(r.seq, errno))
		}
		return out
	}
}

// silent is a kernel that is broken.
func silent([]request) [][]byte { return nil }

func TestExchangeTellsWhatWasRefused(t *testing.T) {
	c, k := newFakeKernel(t)
	k.answer = func(sent []request) [][]byte {
		return [][]byte{
			says(sent[0].seq, unix.EEXIST),
			append(says(sent[2].seq, unix.EMFILE), says(sent[4].seq, unix.ENOENT)...),
		}
	}
	var e encoder
	first := c.nextSeq(5)
	for i := range uint32(5) {
		e.deleteExpect(first+i, &seed.Key)
	}
	got := map[uint32]error{}
	if err := c.exchange(&e, func(seq uint32, err error) { got[seq-first] = err }, nil); err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0] != unix.EEXIST || got[2] != unix.EMFILE || got[4] != unix.ENOENT {
		t.Errorf("refused: %v", got)
	}
}

func TestExchangeOfNothingSendsNothing(t *testing.T) {
	c, k := newFakeKernel(t)
	k.answer = func([]request) [][]byte { panic("sent") }
	if err := c.exchange(new(encoder), nil, nil); err != nil {
		t.Error(err)
	}
}

func TestExchangeFails(t *testing.T) {
	for name, tt := range map[string]struct {
		answer func(sent []request) [][]byte
		want   error
	}{
		"silence":        {silent, os.ErrDeadlineExceeded},
		"half a header":  {func([]request) [][]byte { return [][]byte{{3: 0, 15: 0}} }, errMalformed},
		"too long":       {func(s []request) [][]byte { return [][]byte{says(s[0].seq, 0)[:18]} }, errMalformed},
		"no errno":       {func(s []request) [][]byte { return [][]byte{message(unix.NLMSG_ERROR, s[0].seq, nil)} }, errMalformed},
		"no privilege":   {func(s []request) [][]byte { return [][]byte{says(s[0].seq, unix.EPERM)} }, unix.EPERM},
		"all is well":    {acknowledge, nil},
		"last is denied": {func(s []request) [][]byte { return [][]byte{says(s[1].seq, unix.EPERM)} }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := newFakeKernel(t)
			c.timeout = 10 * time.Millisecond
			k.answer = tt.answer
			var e encoder
			e.deleteExpect(c.nextSeq(1), &seed.Key)
			e.deleteExpect(c.nextSeq(1), &seed.Key)
			if err := c.exchange(&e, func(uint32, error) {}, nil); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

// The answer to a look-up that was given up must not be taken for the answer to
// the next.
func TestLateAnswersAreSkipped(t *testing.T) {
	c, k := newFakeKernel(t)
	c.timeout = 10 * time.Millisecond
	c.seq = ^uint32(0) - 1 // the numbers wrap on the way
	x := message(subsysExpect<<8|msgNew, 0, goldenExpectation)
	var late request
	k.answer = func(sent []request) [][]byte { late = sent[0]; return nil }
	var e encoder
	if _, _, err := c.get(&e, &seed.Key); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	k.answer = func(sent []request) [][]byte {
		binary.NativeEndian.PutUint32(x[8:], late.seq)
		return [][]byte{x, says(late.seq, unix.EMFILE), says(sent[0].seq, unix.ENOENT)}
	}
	if x, found, err := c.get(&e, &seed.Key); found || err != nil {
		t.Errorf("found %v: %+v, error %v", found, x, err)
	}
}

// newFakeBackend returns a Backend with a helper on a fake kernel.
func newFakeBackend(t *testing.T) (*Backend, *fakeKernel) {
	t.Helper()
	c, k := newFakeKernel(t)
	c.timeout = 10 * time.Millisecond
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

// When nobody knows what the kernel did, nothing is taken for granted nor
// forgotten, and nobody waits for a broken kernel more often than needed.
func TestGrantWithUnknownOutcome(t *testing.T) {
	b, k := newFakeBackend(t)
	b.SetTableSize(104) // makes 78
	ps := many(80)
	sends := 0
	k.answer = func([]request) [][]byte { sends++; return nil }
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

	k.answer = acknowledge
	if err := b.Revoke(ps); err != nil || b.Standing() != 0 {
		t.Errorf("Revoke: %v, %d stand", err, b.Standing())
	}
}

// A grant is what latency is made of.
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
			k.answer = func(sent []request) [][]byte {
				for _, r := range sent {
					got = append(got, r.typ)
				}
				return acknowledge(sent)
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

// A send that fails must not harm what a refused permission of the batch, which
// was not sent, has nothing to do with.
func TestFailedSendHarmsNoOther(t *testing.T) {
	b, k := newFakeBackend(t)
	b.SetTableSize(2) // makes 1
	ps := many(2)
	b.Grant(ps[:1], func(int, cone.Reason, error) { t.Error("refused") })

	var deleted int
	k.answer = func(sent []request) [][]byte {
		for _, r := range sent {
			if r.typ&0xff == msgDelete {
				deleted++
			}
		}
		return refuseAll(unix.ENOENT)(sent)
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
	for name, answer := range map[string]func([]request) [][]byte{
		"silence": silent, "refusal": refuseAll(unix.EBUSY),
	} {
		k.answer = answer
		if err := b.Revoke(ps); err == nil || b.Standing() != 3 {
			t.Errorf("%s: Revoke = %v, %d stand", name, err, b.Standing())
		}
	}
	k.answer = refuseAll(unix.ENOENT)
	if err := b.Revoke(ps); err != nil || b.Standing() != 0 {
		t.Errorf("Revoke = %v, %d stand", err, b.Standing())
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
		{answers{1: unix.EBUSY}, cone.ReasonTaken, "create expectation: device or resource busy"},
		{answers{2: unix.ETIME}, cone.ReasonKernel, "set timeout of expectation: timer expired"},
	} {
		if got := tt.errs.reason(); got != tt.want || tt.errs.cause().Error() != tt.text {
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
			k.answer = func(sent []request) [][]byte {
				for _, r := range sent {
					got = append(got, r.typ)
				}
				return acknowledge(sent)
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

func FuzzWalk(f *testing.F) {
	f.Add(says(5, unix.ENOENT), uint32(4), uint32(6))
	f.Add(append(message(subsysExpect<<8, 5, goldenExpectation), says(5, 0)...), uint32(5), uint32(5))
	f.Add(append(says(^uint32(0), unix.EPERM), says(3, 0)...), ^uint32(0), uint32(3))
	f.Add(says(5, 0)[:17], uint32(5), uint32(5))
	f.Fuzz(func(t *testing.T, b []byte, first, last uint32) {
		within := func(seq uint32) bool { return seq-first <= last-first }
		done, err := walk(b, first, last, func(seq uint32, err error) {
			var errno unix.Errno
			if !within(seq) || !errors.As(err, &errno) || errno == 0 || int32(errno) < 0 {
				t.Fatalf("%d refused: %v", seq, err)
			}
		}, func(_ uint16, body []byte) {
			if len(body) > len(b) {
				t.Fatal("more than there is")
			}
		})
		if done && err != nil {
			t.Fatal("done and failed")
		}
	})
}
