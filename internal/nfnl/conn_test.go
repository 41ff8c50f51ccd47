package nfnl_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// some appends a message.
func some(e *nfnl.Encoder, seq uint32) {
	e.Message(2, 2, unix.NLM_F_REQUEST, seq, unix.AF_INET)
	e.BE32(1, 7)
	e.End()
}

func TestExchangeTellsWhatWasRefused(t *testing.T) {
	c, k := nfnltest.New(t)
	k.Answer = func(sent []nfnltest.Request) [][]byte {
		return [][]byte{
			nfnltest.Says(sent[0].Seq, unix.EEXIST),
			append(nfnltest.Says(sent[2].Seq, unix.EMFILE), nfnltest.Says(sent[4].Seq, unix.ENOENT)...),
		}
	}
	var e nfnl.Encoder
	first := c.NextSeq(5)
	for i := range uint32(5) {
		some(&e, first+i)
	}
	got := map[uint32]error{}
	if err := c.Exchange(&e, func(seq uint32, err error) { got[seq-first] = err }, nil); err != nil {
		t.Fatal(err)
	}
	if len(got) != 3 || got[0] != unix.EEXIST || got[2] != unix.EMFILE || got[4] != unix.ENOENT {
		t.Errorf("refused: %v", got)
	}
}

func TestExchangeOfNothingSendsNothing(t *testing.T) {
	c, k := nfnltest.New(t)
	k.Answer = func([]nfnltest.Request) [][]byte { panic("sent") }
	if err := c.Exchange(new(nfnl.Encoder), nil, nil); err != nil {
		t.Error(err)
	}
}

func TestExchangeFails(t *testing.T) {
	for name, tt := range map[string]struct {
		answer func(sent []nfnltest.Request) [][]byte
		want   error
	}{
		"silence":       {nfnltest.Silent, os.ErrDeadlineExceeded},
		"half a header": {func([]nfnltest.Request) [][]byte { return [][]byte{{3: 0, 15: 0}} }, nfnl.ErrMalformed},
		"too long":      {func(s []nfnltest.Request) [][]byte { return [][]byte{nfnltest.Says(s[0].Seq, 0)[:18]} }, nfnl.ErrMalformed},
		"no errno": {func(s []nfnltest.Request) [][]byte {
			return [][]byte{nfnltest.Message(unix.NLMSG_ERROR, s[0].Seq, nil)}
		}, nfnl.ErrMalformed},
		"no privilege":   {func(s []nfnltest.Request) [][]byte { return [][]byte{nfnltest.Says(s[0].Seq, unix.EPERM)} }, unix.EPERM},
		"all is well":    {nfnltest.Acknowledge, nil},
		"last is denied": {func(s []nfnltest.Request) [][]byte { return [][]byte{nfnltest.Says(s[1].Seq, unix.EPERM)} }, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := nfnltest.New(t)
			c.Timeout = 10 * time.Millisecond
			k.Answer = tt.answer
			var e nfnl.Encoder
			some(&e, c.NextSeq(1))
			some(&e, c.NextSeq(1))
			if err := c.Exchange(&e, func(uint32, error) {}, nil); !errors.Is(err, tt.want) {
				t.Errorf("error %v, want %v", err, tt.want)
			}
		})
	}
}

// Only newer kernels answer the end of a transaction.
func TestLastMessageIsAcknowledgedAndNoOther(t *testing.T) {
	for name, encode := range map[string]func(e *nfnl.Encoder){
		"single messages": func(e *nfnl.Encoder) { some(e, 7); some(e, 9); some(e, 12) },
		"transaction": func(e *nfnl.Encoder) {
			e.BeginTransaction(10, 7)
			some(e, 9)
			some(e, 12)
			e.EndTransaction(10, 13)
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := nfnltest.New(t)
			k.Answer = func(sent []nfnltest.Request) [][]byte {
				for _, r := range sent {
					if acked := r.Flags&unix.NLM_F_ACK != 0; acked != (r.Seq == 12) {
						t.Errorf("message %d has flags %x", r.Seq, r.Flags)
					}
				}
				return [][]byte{nfnltest.Says(12, 0)}
			}
			var e nfnl.Encoder
			encode(&e)
			if err := c.Exchange(&e, nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
}

// Each message of a transaction has its own answer. An answer to the first message is about
// the whole transaction, and later answers must not count for another exchange.
func TestRefusedTransaction(t *testing.T) {
	c, k := nfnltest.New(t)
	k.Answer = func([]nfnltest.Request) [][]byte {
		return [][]byte{nfnltest.Says(7, unix.ERESTART), nfnltest.Says(9, 0)}
	}
	var e nfnl.Encoder
	e.BeginTransaction(10, 7)
	some(&e, 9)
	e.EndTransaction(10, 10)
	if err := c.Exchange(&e, nil, nil); !errors.Is(err, unix.ERESTART) {
		t.Errorf("error %v, want ERESTART", err)
	}
	k.Answer = nfnltest.Silent
	c.Timeout = 10 * time.Millisecond
	e.Reset()
	some(&e, 9)
	if err := c.Exchange(&e, nil, nil); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("an answer to what went before was taken: error %v", err)
	}
}

// The kernel sets the flag on the next message that it writes, which may be the last one,
// and the dump continues to its end.
func TestInterruptedDump(t *testing.T) {
	part := func(seq uint32, flags uint16) []byte {
		b := nfnltest.Message(0x200, seq, []byte("body"))
		binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_MULTI|flags)
		return b
	}
	done := func(seq uint32, flags uint16) []byte {
		b := nfnltest.Message(unix.NLMSG_DONE, seq, make([]byte, 4))
		binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_MULTI|flags)
		return b
	}
	for name, tt := range map[string]struct {
		answer func(seq uint32) [][]byte
		want   error
	}{
		"whole": {func(seq uint32) [][]byte { return [][]byte{part(seq, 0), part(seq, 0), done(seq, 0)} }, nil},
		"at the first datagram": {func(seq uint32) [][]byte {
			return [][]byte{part(seq, unix.NLM_F_DUMP_INTR), part(seq, 0), done(seq, 0)}
		}, nfnl.ErrInterrupted},
		"in the midst of a datagram": {func(seq uint32) [][]byte {
			return [][]byte{append(part(seq, unix.NLM_F_DUMP_INTR), part(seq, 0)...), done(seq, 0)}
		}, nfnl.ErrInterrupted},
		"at the end": {func(seq uint32) [][]byte {
			return [][]byte{part(seq, 0), append(part(seq, 0), done(seq, unix.NLM_F_DUMP_INTR)...)}
		}, nfnl.ErrInterrupted},
		"of somebody else": {func(seq uint32) [][]byte {
			return [][]byte{append(part(seq-1, unix.NLM_F_DUMP_INTR), part(seq, 0)...), part(seq, 0), done(seq, 0)}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := nfnltest.New(t)
			k.Answer = func(sent []nfnltest.Request) [][]byte { return tt.answer(sent[0].Seq) }
			var e nfnl.Encoder
			some(&e, c.NextSeq(1))
			n := 0
			err := c.Exchange(&e, func(_ uint32, err error) { t.Error(err) }, func(uint16, []byte) { n++ })
			if !errors.Is(err, tt.want) || n != 2 {
				t.Errorf("%d messages and %v, want 2 and %v", n, err, tt.want)
			}
		})
	}
}

func TestInterruptedDumpIsRepeatedAFewTimes(t *testing.T) {
	fails := errors.New("another error")
	for name, tt := range map[string]struct {
		errs  []error // of each call, the last one of all further ones
		want  error
		calls int
	}{
		"whole":       {[]error{nil}, nil, 1},
		"in the end":  {[]error{nfnl.ErrInterrupted, fmt.Errorf("list: %w", nfnl.ErrInterrupted), nil}, nil, 3},
		"never":       {[]error{nfnl.ErrInterrupted}, nfnl.ErrInterrupted, 4},
		"other error": {[]error{fails}, fails, 1},
	} {
		calls := 0
		err := nfnl.Uninterrupted(func() error { calls++; return tt.errs[min(calls, len(tt.errs))-1] })
		if !errors.Is(err, tt.want) || calls != tt.calls {
			t.Errorf("%s: %d calls and %v, want %d and %v", name, calls, err, tt.calls, tt.want)
		}
	}
}

func FuzzWalk(f *testing.F) {
	f.Add(nfnltest.Says(5, unix.ENOENT), uint32(4), uint32(6), false)
	f.Add(append(nfnltest.Message(0x200, 5, []byte("body")), nfnltest.Says(5, 0)...), uint32(5), uint32(5), false)
	f.Add(append(nfnltest.Says(^uint32(0), unix.EPERM), nfnltest.Says(3, 0)...), ^uint32(0), uint32(3), false)
	f.Add(nfnltest.Says(5, 0)[:17], uint32(5), uint32(5), false)
	f.Fuzz(func(t *testing.T, b []byte, first, last uint32, transaction bool) {
		within := func(seq uint32) bool { return seq-first <= last-first }
		done, _, err := nfnl.Walk(b, first, last, transaction, func(seq uint32, err error) {
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

// Fails when an error that two callers pass on says twice which privilege is needed, and when it
// loses its cause.
func TestPermittedSaysOnceWhatIsNeeded(t *testing.T) {
	err := nfnl.Permitted(fmt.Errorf("try tables: %w", nfnl.Permitted(unix.EPERM)))
	if want := "try tables: operation not permitted: run as root or with CAP_NET_ADMIN"; err.Error() != want || !errors.Is(err, unix.EPERM) {
		t.Errorf("%v, want %s", err, want)
	}
	if other := nfnl.Permitted(unix.EEXIST); !errors.Is(other, unix.EEXIST) || other.Error() != unix.EEXIST.Error() {
		t.Error(other)
	}
}
