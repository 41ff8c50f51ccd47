package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// queryTimeout bounds every wait for the kernel. The kernel answers before the send
// returns, so the timeout is reached only if something is badly wrong.
const queryTimeout = 5 * time.Second

var (
	errMalformed   = errors.New("malformed message")
	errInterrupted = errors.New("the table changed while it was read")
)

// A conn asks the kernel by netlink and reads the answers, one by one, into one
// buffer: netlink.Conn would hold a whole dump, and allocate. It is not safe
// for concurrent use.
type conn struct {
	nl  *netlink.Conn
	raw syscall.RawConn
	in  []byte
	seq uint32

	// What read and write use, kept here so that they need no closure per call.
	out         []byte
	n           int
	err         error
	read, write func(fd uintptr) bool
}

func dial(family, netns int) (*conn, error) {
	nl, err := netlink.Dial(family, &netlink.Config{NetNS: netns})
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w (another network namespace needs CAP_SYS_ADMIN)", err)
	}
	if err != nil {
		return nil, fmt.Errorf("dial netlink: %w", err)
	}
	// The kernel sends a dump in parts of at most 32 KiB.
	c := &conn{nl: nl, in: make([]byte, 64<<10)}
	if c.raw, err = nl.SyscallConn(); err != nil {
		_ = nl.Close()
		return nil, fmt.Errorf("get raw connection: %w", err)
	}
	c.write = func(fd uintptr) bool {
		_, c.err = unix.Write(int(fd), c.out)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	c.read = func(fd uintptr) bool {
		c.n, c.err = unix.Read(int(fd), c.in)
		return !errors.Is(c.err, unix.EAGAIN)
	}
	return c, nil
}

func (c *conn) close() error { return c.nl.Close() }

// newRequest returns a message with an empty body of the given size.
func newRequest(typ, flags uint16, body int) []byte {
	b := make([]byte, unix.NLMSG_HDRLEN+body)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], typ)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST|flags)
	return b
}

// exchange sends a request and calls each with the body of every message of the answer; the
// body is valid during the call. If the kernel refuses, the error is its unix.Errno.
// errInterrupted says that a dump is complete but may have gaps.
func (c *conn) exchange(request []byte, each func(body []byte) error) error {
	c.seq++
	binary.NativeEndian.PutUint32(request[8:], c.seq)
	c.out = request
	if err := c.raw.Write(c.write); err != nil {
		return fmt.Errorf("send netlink request: %w", err)
	}
	if c.err != nil {
		return fmt.Errorf("send netlink request: %w", c.err)
	}
	interrupted := false
	for {
		b, err := c.receive()
		if err != nil {
			return fmt.Errorf("receive netlink answer: %w", err)
		}
		for len(b) >= unix.NLMSG_HDRLEN {
			n := int(binary.NativeEndian.Uint32(b))
			if n < unix.NLMSG_HDRLEN || n > len(b) {
				return errMalformed
			}
			typ := binary.NativeEndian.Uint16(b[4:])
			flags := binary.NativeEndian.Uint16(b[6:])
			seq := binary.NativeEndian.Uint32(b[8:])
			body := b[unix.NLMSG_HDRLEN:n]
			b = b[min((n+3)&^3, len(b)):]
			if seq != c.seq {
				continue // an answer to an earlier exchange that failed
			}
			interrupted = interrupted || flags&unix.NLM_F_DUMP_INTR != 0
			if typ != unix.NLMSG_ERROR && typ != unix.NLMSG_DONE {
				if err := each(body); err != nil {
					return err
				}
				if flags&unix.NLM_F_MULTI == 0 {
					return nil
				}
				continue
			}
			switch {
			case len(body) < 4:
				return errMalformed
			case int32(binary.NativeEndian.Uint32(body)) < 0:
				return unix.Errno(-int32(binary.NativeEndian.Uint32(body)))
			case interrupted:
				return errInterrupted
			}
			return nil
		}
	}
}

func (c *conn) receive() ([]byte, error) {
	if err := c.nl.SetReadDeadline(time.Now().Add(queryTimeout)); err != nil {
		return nil, err
	}
	if err := c.raw.Read(c.read); err != nil {
		return nil, err
	}
	return c.in[:max(c.n, 0)], c.err
}

// attributes calls each for every attribute that follows a header of the given
// size.
func attributes(b []byte, header int, each func(*netlink.AttributeDecoder)) error {
	if len(b) < header {
		return errMalformed
	}
	ad, err := netlink.NewAttributeDecoder(b[header:])
	if err != nil {
		return err
	}
	for ad.Next() {
		each(ad)
	}
	return ad.Err()
}
