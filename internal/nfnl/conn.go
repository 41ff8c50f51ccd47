package nfnl

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

// A Conn is a netlink connection that sends batches and reads their answers without
// allocating, one message after the other. It is not safe for concurrent use.
type Conn struct {
	// Timeout limits every wait for the kernel. The kernel answers a request before the
	// send returns, so the timeout expires only if something is badly wrong.
	Timeout time.Duration

	nl  *netlink.Conn
	raw syscall.RawConn
	in  []byte
	seq uint32

	// Arguments and results of send and recv, so that they need no closure per call.
	out         []byte
	n           int
	err         error
	write, recv func(fd uintptr) bool
	tryFn       func(fd uintptr)
}

// Dial connects to netfilter in the network namespace behind a descriptor, 0 for the
// current one.
func Dial(netns int) (*Conn, error) { return DialProtocol(unix.NETLINK_NETFILTER, netns) }

// DialProtocol is Dial for any protocol of netlink, such as unix.NETLINK_ROUTE.
func DialProtocol(protocol, netns int) (*Conn, error) {
	nl, err := netlink.Dial(protocol, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, fmt.Errorf("dial netlink: %w", err)
	}
	// Answers must fit even if the kernel refuses every message of a batch. Without
	// privilege the buffer stays smaller, but then the first request fails anyway.
	_ = nl.SetReadBuffer(4 << 20)
	_ = nl.SetWriteBuffer(1 << 20)
	c, err := Over(nl)
	if err != nil {
		return nil, errors.Join(err, nl.Close())
	}
	return c, nil
}

// Over returns a Conn that uses nl. Others may use nl, too, but not during an exchange.
func Over(nl *netlink.Conn) (*Conn, error) {
	c := &Conn{nl: nl, Timeout: 5 * time.Second, in: make([]byte, 256<<10)}
	var err error
	if c.raw, err = nl.SyscallConn(); err != nil {
		return nil, fmt.Errorf("get raw connection: %w", err)
	}
	if err := nl.SetOption(netlink.CapAcknowledge, true); err != nil {
		return nil, fmt.Errorf("set netlink option: %w", err)
	}
	c.write = func(fd uintptr) bool {
		_, c.err = unix.Write(int(fd), c.out)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	c.tryFn = func(fd uintptr) {
		for {
			if c.n, c.err = unix.Read(int(fd), c.in); !errors.Is(c.err, unix.EINTR) {
				return
			}
		}
	}
	c.recv = func(fd uintptr) bool {
		c.tryFn(fd)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	return c, nil
}

// OverFake is Over for tests: messages go to send instead of the kernel.
func OverFake(nl *netlink.Conn, send func(b []byte)) (*Conn, error) {
	c, err := Over(nl)
	if err == nil {
		c.write = func(uintptr) bool {
			c.err = nil
			send(c.out)
			return true
		}
	}
	return c, err
}

// Close closes the underlying connection.
func (c *Conn) Close() error { return c.nl.Close() }

// NextSeq reserves n sequence numbers and returns the first.
func (c *Conn) NextSeq(n int) uint32 {
	first := c.seq + 1
	c.seq += uint32(n)
	return first
}

func (c *Conn) send(b []byte) error {
	c.out = b
	if err := c.raw.Write(c.write); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	if c.err != nil {
		return os.NewSyscallError("write", c.err)
	}
	return nil
}

// receive returns the next datagram. Normally the datagram is queued already, because the
// kernel processes a request before the send returns. Only otherwise a deadline is set.
func (c *Conn) receive() ([]byte, error) {
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

func (c *Conn) wait() error {
	if err := c.nl.SetReadDeadline(time.Now().Add(c.Timeout)); err != nil {
		return err
	}
	err := c.raw.Read(c.recv)
	return errors.Join(err, c.nl.SetReadDeadline(time.Time{}))
}

// Exchange sends the messages in e, asks for an acknowledgement of the last and waits for
// it. It calls failed for each message that the kernel refuses, and data, if not nil, for
// each answer; body is valid during the call. An error says that the outcome is not known.
// ErrInterrupted says that a dump was read to its end, but may lack something.
func (c *Conn) Exchange(e *Encoder, failed func(seq uint32, err error), data func(typ uint16, body []byte)) error {
	if len(e.B) == 0 {
		return nil
	}
	e.ack()
	if err := c.send(e.B); err != nil {
		return err
	}
	first, last := e.firstSeq(), e.lastSeq()
	interrupted := false
	for {
		b, err := c.receive()
		if err != nil {
			return err
		}
		done, torn, err := walk(b, first, last, e.transaction, failed, data)
		interrupted = interrupted || torn
		switch {
		case err != nil:
			c.drain()
			return err
		case done && interrupted:
			return ErrInterrupted
		case done:
			return nil
		}
	}
}

// Ask is Exchange of a single message. If the kernel refuses it, the error is its unix.Errno,
// as it is, even if the dump was interrupted before.
func (c *Conn) Ask(e *Encoder, data func(typ uint16, body []byte)) error {
	var refused error
	err := c.Exchange(e, func(_ uint32, err error) { refused = err }, data)
	if refused != nil && (err == nil || errors.Is(err, ErrInterrupted)) {
		return refused
	}
	return err
}

// drain discards what the kernel sent after the error that ended an exchange, so that it is
// not taken for an answer to another request.
func (c *Conn) drain() {
	for c.raw.Control(c.tryFn) == nil && c.err == nil {
	}
}

// walk reads the messages of one datagram, which may answer the requests with the sequence
// numbers first to last. It skips other answers, which belong to an exchange that was given
// up. It reports whether the last request is answered, and whether the kernel says that the
// dumped objects changed during the dump (nl_dump_check_consistent).
func walk(b []byte, first, last uint32, transaction bool, failed func(seq uint32, err error), data func(typ uint16, body []byte)) (done, interrupted bool, err error) {
	for len(b) > 0 {
		h, msg, rest, ok := NextMessage(b)
		if !ok {
			return false, false, ErrMalformed
		}
		typ, seq, body := h.Type, h.Seq, msg[unix.NLMSG_HDRLEN:]
		b = rest
		ours := seq-first <= last-first // the numbers may wrap
		interrupted = interrupted || ours && h.Flags&unix.NLM_F_DUMP_INTR != 0
		switch {
		case !ours:
		case typ == unix.NLMSG_ERROR || typ == unix.NLMSG_DONE:
			if len(body) < 4 {
				return false, false, ErrMalformed
			}
			errno := -int32(binary.NativeEndian.Uint32(body))
			if errno > 0 && seq == first && first != last && (transaction || unix.Errno(errno) == unix.EPERM) {
				// The transaction as a whole was refused. Or the privilege is missing: then
				// nfnetlink answers the first message and drops the others.
				return false, false, unix.Errno(errno)
			}
			if errno > 0 {
				failed(seq, unix.Errno(errno))
			}
			if seq == last {
				return true, interrupted, nil
			}
		case data != nil:
			data(typ, body)
		}
	}
	return false, interrupted, nil
}

// A Header is the part of struct nlmsghdr that we read.
type Header struct {
	Type, Flags uint16
	Seq         uint32
}

// NextMessage splits the first message off a datagram, which must not be empty. msg includes
// the header. If ok is false, nothing more of b can be read. It does not allocate.
func NextMessage(b []byte) (h Header, msg, rest []byte, ok bool) {
	if len(b) < unix.NLMSG_HDRLEN {
		return Header{}, nil, nil, false
	}
	// Compare unsigned: the length may not fit an int of 32 bits.
	n := binary.NativeEndian.Uint32(b)
	if n < unix.NLMSG_HDRLEN || uint64(n) > uint64(len(b)) {
		return Header{}, nil, nil, false
	}
	h = Header{
		Type:  binary.NativeEndian.Uint16(b[4:]),
		Flags: binary.NativeEndian.Uint16(b[6:]),
		Seq:   binary.NativeEndian.Uint32(b[8:]),
	}
	return h, b[:n], b[min(align4(int(n)), len(b)):], true
}

// ErrMalformed says that an answer is not a netlink message.
var ErrMalformed = errors.New("receive netlink answer: malformed message")

// ErrInterrupted says that the dumped objects changed during the dump, so that some may be
// missing or appear twice.
var ErrInterrupted = errors.New("receive netlink answer: the dump was interrupted by a change")

// dumps is how often an interrupted dump is made in total.
const dumps = 4

// Uninterrupted calls dump until it is not interrupted, a few times at most.
func Uninterrupted(dump func() error) (err error) {
	for range dumps {
		if err = dump(); !errors.Is(err, ErrInterrupted) {
			break
		}
	}
	return err
}

// Permitted adds to an EPERM which privilege is needed, once.
func Permitted(err error) error {
	if errors.Is(err, unix.EPERM) && !errors.As(err, new(unprivileged)) {
		return unprivileged{err}
	}
	return err
}

// unprivileged is an EPERM that says which privilege is needed.
type unprivileged struct{ error }

func (e unprivileged) Error() string { return e.error.Error() + ": run as root or with CAP_NET_ADMIN" }

func (e unprivileged) Unwrap() error { return e.error }
