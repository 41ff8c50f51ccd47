package ctwatch

import (
	"encoding/binary"
	"errors"
	"iter"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// fakeKernel answers each request with what answer returns.
type fakeKernel struct {
	*os.File // the near end, where Queries reads
	far      *os.File
	answer   func(seq uint32) [][]byte
}

func (k fakeKernel) Send(m netlink.Message) error {
	for _, b := range k.answer(m.Header.Sequence) {
		if _, err := k.far.Write(b); err != nil {
			return err
		}
	}
	return nil
}

// What Queries does not use.
func (fakeKernel) SendMessages([]netlink.Message) error { return errors.ErrUnsupported }

func (fakeKernel) Receive() ([]netlink.Message, error)            { return nil, errors.ErrUnsupported }
func (fakeKernel) ReceiveIter() iter.Seq2[netlink.Message, error] { return nil }

func answering(t *testing.T, answer func(seq uint32) [][]byte) *Queries {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	k := fakeKernel{os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far"), answer}
	q := dialQueries(t, Config{})
	_ = q.reset()
	q.conn = netlink.NewConn(k, 1)
	if q.rc, err = k.SyscallConn(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.far.Close() })
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
	broken := newMsg(tuples, attr(ctaMark, 1))
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
		}, ErrInterrupted},
		{"ended by an error", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI, seq), done(unix.ENOMEM, seq)}
		}, unix.ENOMEM},
		{"broken entry", func(seq uint32) [][]byte {
			return [][]byte{reply(broken, unix.NLM_F_MULTI, seq), reply(entry, unix.NLM_F_MULTI, seq), done(0, seq)}
		}, errMalformed},
		{"broken length", func(seq uint32) [][]byte {
			return [][]byte{reply(entry, unix.NLM_F_MULTI, seq), {1, 0, 0, 0}}
		}, errMalformed},
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
