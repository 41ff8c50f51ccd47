package ctwatch

import (
	"encoding/binary"
	"errors"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// answering returns Queries of a fake kernel, which answers each request with what answer
// returns.
func answering(t *testing.T, answer func(seq uint32) [][]byte) *Queries {
	t.Helper()
	c, k := nfnltest.New(t)
	k.Answer = func(sent []nfnltest.Request) [][]byte { return answer(sent[0].Seq) }
	q := dialQueries(t, Config{})
	_ = q.reset()
	q.conn = c
	return q
}

// reply sets flags and sequence of a message.
func reply(msg []byte, flags uint16, seq uint32) []byte {
	msg = append([]byte(nil), msg...)
	binary.NativeEndian.PutUint16(msg[6:], flags)
	binary.NativeEndian.PutUint32(msg[8:], seq)
	return msg
}

func done(errno syscall.Errno, seq uint32) []byte {
	b := binary.NativeEndian.AppendUint32(nil, errno32(errno))
	return reply(netlinkMsg(unix.NLMSG_DONE, 0, b), unix.NLM_F_MULTI, seq)
}

func TestDumpSaysWhenItIsNotWhole(t *testing.T) {
	entry := newMsg(tuples)
	broken := newMsg(tuples, attr(nfnl.CTAMark, 1))
	for _, tt := range []struct {
		name   string
		answer func(seq uint32) [][]byte
		want   error
	}{
		{"whole", func(seq uint32) [][]byte {
			return [][]byte{append(reply(entry, unix.NLM_F_MULTI, seq), done(0, seq)...)}
		}, nil},
		{"interrupted", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI|unix.NLM_F_DUMP_INTR, seq), done(0, seq)}
		}, nfnl.ErrInterrupted},
		{"ended by an error", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI, seq), done(unix.ENOMEM, seq)}
		}, unix.ENOMEM},
		{"broken entry", func(seq uint32) [][]byte {
			return [][]byte{reply(broken, unix.NLM_F_MULTI, seq), reply(entry, unix.NLM_F_MULTI, seq), done(0, seq)}
		}, errMalformed},
		{"broken length", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI, seq), {1, 0, 0, 0}}
		}, nfnl.ErrMalformed},
		{"late answers to an earlier query", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI, seq-1), done(unix.EPERM, seq-1), reply(entry, unix.NLM_F_MULTI, seq), done(0, seq)}
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			n, requests := 0, 0
			q := answering(t, func(seq uint32) [][]byte {
				if requests++; requests == 1 {
					return tt.answer(seq)
				}
				return [][]byte{done(0, seq)} // IPv6
			})
			err := q.Dump(func(*cone.Flow) { n++ })
			if !errors.Is(err, tt.want) || n != 1 {
				t.Errorf("%d flows, error %v, want 1 and %v", n, err, tt.want)
			}
		})
	}
}

func TestDumpGoesOnWithoutAFilterThatTheKernelRefuses(t *testing.T) {
	requests := 0
	q := answering(t, func(seq uint32) [][]byte {
		if requests++; requests == 1 {
			refusal := binary.NativeEndian.AppendUint32(nil, errno32(unix.EOPNOTSUPP))
			return [][]byte{reply(netlinkMsg(unix.NLMSG_ERROR, 0, refusal), 0, seq)}
		}
		return [][]byte{done(0, seq)}
	})
	for range 2 {
		if err := q.Dump(func(*cone.Flow) {}); err != nil {
			t.Error(err)
		}
	}
	if requests != 5 || !q.noFilter {
		t.Errorf("%d requests for two dumps of two families, want 5", requests)
	}
}

func TestQueryWithoutAnAnswerEndsAndTheNextOneWorks(t *testing.T) {
	enterNetNS(t)
	q := answering(t, func(uint32) [][]byte { return nil })
	q.cfg.Timeout = time.Millisecond
	if err := q.Dump(func(*cone.Flow) {}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("error %v, want os.ErrDeadlineExceeded", err)
	}
	q.cfg.Timeout = within
	makeFlows(t, 1)
	if anyFlow(t, q) == (cone.Flow{}) { // on a new socket, to the real kernel
		t.Error("no flow")
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := q.Dump(func(*cone.Flow) {}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("error after Close: %v", err)
	}
}

// errno32 is -errno as it stands in a message.
func errno32(errno syscall.Errno) uint32 { return -uint32(errno) }
