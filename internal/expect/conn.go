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
	nl      *netlink.Conn
	raw     syscall.RawConn
	timeout time.Duration
	in      []byte
	seq     uint32

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
	c := newConn(nl)
	c.raw, err = nl.SyscallConn()
	// Answers must fit even if the kernel refuses every message of a batch. A
	// smaller buffer without privilege is found out at the first request.
	_ = nl.SetReadBuffer(4 << 20)
	_ = nl.SetWriteBuffer(1 << 20)
	if e := nl.SetOption(netlink.CapAcknowledge, true); err == nil && e != nil {
		err = fmt.Errorf("set netlink option: %w", e)
	}
	if err != nil {
		return nil, errors.Join(err, nl.Close())
	}
	return c, nil
}

func newConn(nl *netlink.Conn) *conn {
	c := &conn{nl: nl, timeout: queryTimeout, in: make([]byte, 256<<10)}
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
	return c
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
	if err := c.nl.SetReadDeadline(time.Now().Add(c.timeout)); err != nil {
		return err
	}
	err := c.raw.Read(c.recv)
	return errors.Join(err, c.nl.SetReadDeadline(time.Time{}))
}

// exchange sends the messages in e, asks for an acknowledgement of the last and
// waits for it. It calls failed for each message that the kernel refuses, and
// data for each that it answers. An error says that the outcome is not known.
func (c *conn) exchange(e *encoder, failed func(seq uint32, err error), data func(typ uint16, body []byte)) error {
	if len(e.b) == 0 {
		return nil
	}
	e.ack()
	if err := c.send(e.b); err != nil {
		return err
	}
	first, last := e.firstSeq(), e.lastSeq()
	for {
		b, err := c.receive()
		if err != nil {
			return err
		}
		if done, err := walk(b, first, last, failed, data); done || err != nil {
			return err
		}
	}
}

// walk reads the messages of one datagram, which may answer the requests with
// the sequence numbers first to last. Answers to others, of an exchange that
// was given up, are skipped. It reports whether the last request is answered.
func walk(b []byte, first, last uint32, failed func(seq uint32, err error), data func(typ uint16, body []byte)) (done bool, err error) {
	for len(b) >= unix.NLMSG_HDRLEN {
		n := binary.NativeEndian.Uint32(b)
		if n < unix.NLMSG_HDRLEN || uint64(n) > uint64(len(b)) {
			return false, errMalformed
		}
		typ := binary.NativeEndian.Uint16(b[4:])
		seq := binary.NativeEndian.Uint32(b[8:])
		body := b[unix.NLMSG_HDRLEN:n]
		b = b[min((int(n)+3)&^3, len(b)):]
		switch {
		case seq-first > last-first: // the numbers may wrap
		case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
			if len(body) < 4 {
				return false, errMalformed
			}
			errno := -int32(binary.NativeEndian.Uint32(body))
			if unix.Errno(errno) == unix.EPERM && seq == first && first != last {
				// Without privilege nfnetlink answers the first message
				// and drops the others.
				return false, unix.EPERM
			}
			if errno > 0 {
				failed(seq, unix.Errno(errno))
			}
			if seq == last {
				return true, nil
			}
		case data != nil:
			data(typ, body)
		}
	}
	return false, nil
}

var errMalformed = errors.New("receive netlink answer: malformed message")

// permitted adds to an error for want of privilege what would mend it.
func permitted(err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	}
	return err
}
