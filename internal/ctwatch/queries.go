package ctwatch

import (
	"cmp"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// DefaultTimeout is how long Queries waits for each part of an answer.
const DefaultTimeout = 5 * time.Second

// errFlush stops a message that would empty the whole table.
var errFlush = errors.New("delete without a tuple and an id refused: it would flush the table")

// Queries asks the conntrack table. Every wait has a deadline. If a query fails for another
// reason than the kernel's answer, the socket is closed and the next query opens a new one,
// so that no answer is taken for that of another query.
//
// Only one goroutine at a time may use it, Close included.
type Queries struct {
	cfg    Config
	conn   *nfnl.Conn // nil until it is opened
	enc    nfnl.Encoder
	closed bool
	// noFilter says that the kernel refused CTA_FILTER.
	noFilter bool
}

// DialQueries opens the query socket. It needs CAP_NET_ADMIN in the user
// namespace that owns the network namespace; without it the first query fails.
func DialQueries(cfg Config) (*Queries, error) {
	cfg.Timeout = cmp.Or(cfg.Timeout, DefaultTimeout)
	q := &Queries{cfg: cfg}
	if err := q.open(); err != nil {
		return nil, err
	}
	return q, nil
}

func (q *Queries) open() error {
	if q.closed {
		return errClosed
	}
	if q.conn != nil {
		return nil
	}
	conn, err := nfnl.Dial(q.cfg.NetNS)
	if err != nil {
		return wrap("open conntrack query socket", err)
	}
	q.conn = conn
	return nil
}

// reset closes the socket, and so discards late answers to an old query.
func (q *Queries) reset() error {
	if q.conn == nil {
		return nil
	}
	conn := q.conn
	q.conn = nil
	return conn.Close()
}

// Close closes the socket. A second Close does nothing.
func (q *Queries) Close() error {
	q.closed = true
	return q.reset()
}

// Get returns the UDP entry that has src and dst as its original or its reply direction, in
// the zone of that direction (ctnetlink_get_conntrack). It returns false if there is none.
// It finds anchors too.
func (q *Queries) Get(src, dst cone.Endpoint, zone uint16) (cone.Flow, bool, error) {
	var f cone.Flow
	var found bool
	var bad error
	// The kernel marks its single message as part of many (ctnetlink_fill_info) but sends
	// no end mark after it: the acknowledgement ends the answer.
	err := q.lookUp(ipctnlMsgCTGet, src, dst, zone, nil, func(body []byte) {
		bad = parseFlow(body, &f)
		found = bad == nil
	})
	if errors.Is(err, unix.ENOENT) {
		return cone.Flow{}, false, nil
	}
	if err = cmp.Or(err, bad); err != nil {
		return cone.Flow{}, false, wrap("get conntrack entry", err)
	}
	return f, found, nil
}

// Delete removes the UDP entry that Get would return, if its ID is id, and returns false if
// there is no such entry (ctnetlink_del_conntrack). A Watcher reports it as Gone.
func (q *Queries) Delete(src, dst cone.Endpoint, zone uint16, id uint32) (bool, error) {
	err := q.lookUp(ipctnlMsgCTDelete, src, dst, zone, func(e *nfnl.Encoder) { e.BE32(nfnl.CTAID, id) }, nil)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, wrap("delete conntrack entry", err)
	}
	return true, nil
}

// lookUp sends a request about one UDP entry. CTA_ZONE names the zone of both directions. It
// also finds an entry that has the zone only in the direction of the tuple.
func (q *Queries) lookUp(typ uint16, src, dst cone.Endpoint, zone uint16, more func(e *nfnl.Encoder), each func(body []byte)) error {
	if src.Addr.Is4() != dst.Addr.Is4() {
		return fmt.Errorf("%v and %v are of different families", src, dst)
	}
	family := nfnl.Family(src.Addr)
	return q.query(typ, 0, family, func(e *nfnl.Encoder) {
		e.Tuple(nfnl.CTATupleOrig, family, &src, &dst)
		if zone != 0 {
			e.BE16(nfnl.CTAZone, zone)
		}
		if more != nil {
			more(e)
		}
	}, each)
}

// query sends one request with the attributes that encode appends, and calls each for each
// message of the answer; body begins at nfgenmsg. The error is the kernel's errno,
// nfnl.ErrInterrupted, or that of the socket. encode and each may be nil.
func (q *Queries) query(typ, flags uint16, family uint8, encode func(e *nfnl.Encoder), each func(body []byte)) error {
	if err := q.open(); err != nil {
		return err
	}
	q.conn.Timeout = q.cfg.Timeout
	q.enc.Reset()
	q.enc.Message(unix.NFNL_SUBSYS_CTNETLINK, typ, unix.NLM_F_REQUEST|flags, q.conn.NextSeq(1), family)
	if encode != nil {
		encode(&q.enc)
	}
	q.enc.End()
	if typ == ipctnlMsgCTDelete && !namesOne(q.enc.B[nfnl.HeaderLen:]) {
		return errFlush
	}
	err := q.conn.Ask(&q.enc, func(typ uint16, body []byte) {
		if typ == ctType(ipctnlMsgCTNew) || typ == ctType(ipctnlMsgCTGetStats) {
			each(body)
		}
	})
	if _, refused := err.(unix.Errno); err != nil && !refused && !errors.Is(err, nfnl.ErrInterrupted) {
		_ = q.reset()
	}
	return err
}

// namesOne reports whether a request to delete names a single entry.
func namesOne(attrs []byte) bool {
	var tuple, id bool
	nfnl.Attributes(attrs, func(typ uint16, _ []byte) {
		tuple = tuple || typ == nfnl.CTATupleOrig
		id = id || typ == nfnl.CTAID
	})
	return tuple && id
}
