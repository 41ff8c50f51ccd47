package gateway

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A conn asks the kernel by rtnetlink or sock_diag and reads the answers, one by one, into
// one buffer: netlink.Conn would hold a whole dump, and allocate. It is not safe for
// concurrent use.
type conn struct {
	*nfnl.Conn
	enc nfnl.Encoder
}

func dial(protocol, netns int) (*conn, error) {
	c, err := nfnl.DialProtocol(protocol, netns)
	if errors.Is(err, unix.EPERM) {
		err = fmt.Errorf("%w (another network namespace needs CAP_SYS_ADMIN)", err)
	}
	if err != nil {
		return nil, err
	}
	return &conn{Conn: c}, nil
}

// begin begins a request, and returns its fixed header of so many bytes, all zero. Fill it
// in before you append attributes to c.enc.
func (c *conn) begin(typ, flags uint16, size int) (header []byte) {
	c.enc.Reset()
	return c.enc.Begin(typ, unix.NLM_F_REQUEST|flags, c.NextSeq(1), size)
}

// exchange sends the request and calls each with the body of every message of the answer,
// until it returns an error; the body is valid during the call. If the kernel refuses, the
// error is its unix.Errno. nfnl.ErrInterrupted says that a dump is complete but may have
// gaps.
func (c *conn) exchange(each func(body []byte) error) error {
	c.enc.End()
	var failed error
	err := c.Ask(&c.enc, func(_ uint16, body []byte) {
		if failed == nil {
			failed = each(body)
		}
	})
	if failed != nil {
		return failed
	}
	return err
}

// attributes calls each for every attribute that follows a header of the given
// size.
func attributes(b []byte, header int, each func(typ uint16, value []byte)) error {
	if len(b) < header || !nfnl.Attributes(b[header:], each) {
		return nfnl.ErrMalformed
	}
	return nil
}

// Values of attributes in the byte order of the host. They are 0 for another size, which the
// kernel does not send.
func word(v []byte) uint32 {
	n, _ := nfnl.NE32(v)
	return n
}

func linkIndex(v []byte) int { return int(int32(word(v))) }

func octet(v []byte) uint8 {
	if len(v) != 1 {
		return 0
	}
	return v[0]
}
