package expect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// queryTimeout bounds every wait for the kernel. It answers netlink requests
// before the send returns, so this is only met when something is badly wrong.
const queryTimeout = 5 * time.Second

// A conn is a netlink connection that sends batches and reads their answers
// without allocating. It is not safe for concurrent use.
type conn struct {
	nl  *netlink.Conn
	raw syscall.RawConn
	in  []byte
	seq uint32

	// What send and recv work on, so that they need no closure per call.
	out          []byte
	n            int
	err          error
	sendFn, recv func(fd uintptr) bool
	tryFn        func(fd uintptr)
}

func dial(netns int) (*conn, error) {
	nl, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("dial netfilter: %w", err)
	}
	c := &conn{nl: nl, in: make([]byte, 256<<10)}
	c.raw, err = nl.SyscallConn()
	// Answers must fit even if the kernel refuses every message of a batch. A
	// smaller buffer without privilege is found out at the first request.
	_ = nl.SetReadBuffer(4 << 20)
	_ = nl.SetWriteBuffer(1 << 20)
	if e := nl.SetOption(netlink.CapAcknowledge, true); err == nil && e != nil {
		err = fmt.Errorf("set netlink option: %w", e)
	}
	if err != nil {
		nl.Close()
		return nil, err
	}
	c.sendFn = func(fd uintptr) bool {
		_, c.err = unix.Write(int(fd), c.out)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	c.tryFn = func(fd uintptr) {
		c.n, c.err = unix.Read(int(fd), c.in)
	}
	c.recv = func(fd uintptr) bool {
		c.tryFn(fd)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	return c, nil
}

func (c *conn) close() error { return c.nl.Close() }

// nextSeq reserves n sequence numbers and returns the first.
func (c *conn) nextSeq(n int) uint32 {
	first := c.seq + 1
	c.seq += uint32(n)
	return first
}

func (c *conn) send(b []byte) error {
	c.out = b
	if err := c.raw.Write(c.sendFn); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	if c.err != nil {
		return os.NewSyscallError("write", c.err)
	}
	return nil
}

// receive returns the next datagram. It is there already as a rule, for the
// kernel works a request off before the send returns; only else does it cost a
// deadline.
func (c *conn) receive() ([]byte, error) {
	err := c.raw.Control(c.tryFn)
	if err == nil && errors.Is(c.err, unix.EAGAIN) {
		err = c.wait()
	}
	if err != nil {
		return nil, fmt.Errorf("receive netlink answer: %w", err)
	}
	if c.err != nil {
		return nil, os.NewSyscallError("read", c.err)
	}
	return c.in[:c.n], nil
}

func (c *conn) wait() error {
	if err := c.nl.SetReadDeadline(time.Now().Add(queryTimeout)); err != nil {
		return err
	}
	err := c.raw.Read(c.recv)
	return errors.Join(err, c.nl.SetReadDeadline(time.Time{}))
}

// exchange sends the messages in b, the last of which asks for an
// acknowledgement and has sequence number last. It calls failed for each
// message that the kernel refuses, and data for each that it answers.
func (c *conn) exchange(b []byte, last uint32, failed func(seq uint32, err error), data func(typ uint16, body []byte)) error {
	if err := c.send(b); err != nil {
		return err
	}
	for {
		b, err := c.receive()
		if err != nil {
			return err
		}
		for len(b) >= unix.NLMSG_HDRLEN {
			n := int(binary.NativeEndian.Uint32(b))
			if n < unix.NLMSG_HDRLEN || n > len(b) {
				return errMalformed
			}
			typ := binary.NativeEndian.Uint16(b[4:])
			seq := binary.NativeEndian.Uint32(b[8:])
			body := b[unix.NLMSG_HDRLEN:n]
			b = b[min((n+3)&^3, len(b)):]
			switch {
			case int32(seq-last) > 0 || int32(last-seq) > 1<<20:
				// An answer to an exchange that was given up.
			case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
				if len(body) < 4 {
					return errMalformed
				}
				if errno := -int32(binary.NativeEndian.Uint32(body)); errno > 0 {
					failed(seq, unix.Errno(errno))
				}
				if seq == last {
					return nil
				}
			case data != nil:
				data(typ, body)
			}
		}
	}
}

var errMalformed = errors.New("receive netlink answer: malformed message")
