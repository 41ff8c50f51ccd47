// Package nfnltest has a fake kernel, for tests in which the kernel refuses, is silent or
// sends nonsense.
package nfnltest

import (
	"encoding/binary"
	"errors"
	"iter"
	"os"
	"slices"
	"testing"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Request is a message that the Kernel received.
type Request struct {
	Type, Flags uint16
	Seq         uint32
	Body        []byte // what follows struct nlmsghdr
}

// A Kernel answers each send with the datagrams that Answer returns.
type Kernel struct {
	*os.File // the near end
	Answer   func(sent []Request) [][]byte
}

// New returns a connection to a Kernel that acknowledges everything. Like the real kernel
// it answers before the send returns.
func New(t *testing.T) (*nfnl.Conn, *Kernel) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	near, far := os.NewFile(uintptr(fds[0]), "near"), os.NewFile(uintptr(fds[1]), "far")
	t.Cleanup(func() { _ = near.Close(); _ = far.Close() })
	k := &Kernel{File: near, Answer: Acknowledge}
	c, err := nfnl.OverFake(netlink.NewConn(k, 1), func(b []byte) {
		for _, answer := range k.Answer(requests(b)) {
			if _, err := far.Write(answer); err != nil {
				t.Error(err)
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return c, k
}

// SetOption does nothing and succeeds.
func (*Kernel) SetOption(netlink.ConnOption, bool) error { return nil }

// Send fails, as do all methods that an nfnl.Conn does not use.
func (*Kernel) Send(netlink.Message) error { return errors.ErrUnsupported }

// SendMessages fails.
func (*Kernel) SendMessages([]netlink.Message) error { return errors.ErrUnsupported }

// Receive fails.
func (*Kernel) Receive() ([]netlink.Message, error) { return nil, errors.ErrUnsupported }

// ReceiveIter returns nil.
func (*Kernel) ReceiveIter() iter.Seq2[netlink.Message, error] { return nil }

func requests(b []byte) (all []Request) {
	for len(b) > 0 {
		n := binary.NativeEndian.Uint32(b)
		all = append(all, Request{
			Type: binary.NativeEndian.Uint16(b[4:]), Flags: binary.NativeEndian.Uint16(b[6:]),
			Seq: binary.NativeEndian.Uint32(b[8:]), Body: slices.Clone(b[unix.NLMSG_HDRLEN:n]),
		})
		b = b[n:]
	}
	return all
}

// Message returns a netlink message.
func Message(typ uint16, seq uint32, body []byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(body)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, 0)
	return append(b, body...)
}

// Says is a kernel's answer to message seq; errno 0 acknowledges.
func Says(seq uint32, errno unix.Errno) []byte {
	return Message(unix.NLMSG_ERROR, seq, binary.NativeEndian.AppendUint32(nil, -uint32(errno)))
}

// Acknowledge is the answer of a kernel that did everything.
func Acknowledge(sent []Request) [][]byte { return [][]byte{Says(sent[len(sent)-1].Seq, 0)} }

// RefuseAll is the answer of a kernel that refuses everything.
func RefuseAll(errno unix.Errno) func(sent []Request) [][]byte {
	return func(sent []Request) (out [][]byte) {
		for _, r := range sent {
			out = append(out, Says(r.Seq, errno))
		}
		return out
	}
}

// Silent is the missing answer of a broken kernel.
func Silent([]Request) [][]byte { return nil }
