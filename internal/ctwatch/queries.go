package ctwatch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// DefaultTimeout is how long Queries waits for each part of an answer.
const DefaultTimeout = 5 * time.Second

// ErrInterrupted says that the table changed during a dump, so that entries may be missing
// or may have come twice.
var ErrInterrupted = errors.New("conntrack dump was interrupted")

// errFlush stops a message that would empty the whole table.
var errFlush = errors.New("delete without a tuple and an id refused: it would flush the table")

// Queries asks the conntrack table. Every wait has a deadline. If a query fails for another
// reason than the kernel's answer, the socket is closed and the next query opens a new one,
// so that no answer is taken for that of another query.
//
// Only one goroutine at a time may use it, Close included.
type Queries struct {
	cfg     Config
	conn    *netlink.Conn // nil until it is opened
	rc      syscall.RawConn
	receive func(fd uintptr) bool // q.read, bound once: binding allocates
	buf     []byte
	n       int
	err     error
	closed  bool
	// noFilter says that the kernel refused CTA_FILTER.
	noFilter bool
}

// DialQueries opens the query socket. It needs CAP_NET_ADMIN in the user
// namespace that owns the network namespace; without it the first query fails.
func DialQueries(cfg Config) (*Queries, error) {
	if cfg.Timeout == 0 {
		cfg.Timeout = DefaultTimeout
	}
	// The kernel writes a dump in parts of up to 32 KiB if the reader's buffer has room for
	// them (netlink_dump).
	q := &Queries{cfg: cfg, buf: make([]byte, 64<<10)}
	q.receive = q.read
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
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: q.cfg.NetNS})
	if err != nil {
		return wrap("open conntrack query socket", err)
	}
	rc, err := conn.SyscallConn()
	if err != nil {
		_ = conn.Close()
		return wrap("get raw connection", err)
	}
	q.conn, q.rc = conn, rc
	return nil
}

// reset closes the socket, and so discards late answers to an old query.
func (q *Queries) reset() error {
	if q.conn == nil {
		return nil
	}
	conn := q.conn
	q.conn, q.rc = nil, nil
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
	attrs, err := lookup(src, dst, zone)
	if err != nil {
		return cone.Flow{}, false, fmt.Errorf("get conntrack entry: %w", err)
	}
	var f cone.Flow
	var found bool
	var bad error
	// The kernel marks its single message as part of many (ctnetlink_fill_info) but sends
	// no end mark after it: the acknowledgement ends the answer.
	err = q.query(ipctnlMsgCTGet, netlink.Acknowledge, family(src.Addr), attrs, func(_ header, msg []byte) {
		bad = parseFlow(msg, &f)
		found = bad == nil
	})
	if err == nil {
		err = bad
	}
	if errors.Is(err, unix.ENOENT) {
		return cone.Flow{}, false, nil
	}
	if err != nil {
		return cone.Flow{}, false, wrap("get conntrack entry", err)
	}
	return f, found, nil
}

// Delete removes the UDP entry that Get would return, if its ID is id, and returns false if
// there is no such entry (ctnetlink_del_conntrack). A Watcher reports it as Gone.
func (q *Queries) Delete(src, dst cone.Endpoint, zone uint16, id uint32) (bool, error) {
	attrs, err := lookup(src, dst, zone)
	if err != nil {
		return false, fmt.Errorf("delete conntrack entry: %w", err)
	}
	attrs = appendAttr(attrs, ctaID, be32(id)...)
	err = q.query(ipctnlMsgCTDelete, netlink.Acknowledge, family(src.Addr), attrs, nil)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, wrap("delete conntrack entry", err)
	}
	return true, nil
}

func family(a cone.Addr) uint8 {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}

// lookup encodes the attributes that name a UDP entry. CTA_ZONE names the zone of both
// directions. It also finds an entry that has the zone only in the direction of the tuple.
func lookup(src, dst cone.Endpoint, zone uint16) ([]byte, error) {
	if src.Addr.Is4() != dst.Addr.Is4() {
		return nil, fmt.Errorf("%v and %v are of different families", src, dst)
	}
	var ip []byte
	if src.Addr.Is4() {
		ip = appendAttr(nil, ctaIPv4Src, src.Addr[12:]...)
		ip = appendAttr(ip, ctaIPv4Dst, dst.Addr[12:]...)
	} else {
		ip = appendAttr(nil, ctaIPv6Src, src.Addr[:]...)
		ip = appendAttr(ip, ctaIPv6Dst, dst.Addr[:]...)
	}
	proto := appendAttr(nil, ctaProtoNum, unix.IPPROTO_UDP)
	proto = appendAttr(proto, ctaProtoSrcPort, be16(src.Port)...)
	proto = appendAttr(proto, ctaProtoDstPort, be16(dst.Port)...)

	tuple := appendNest(nil, ctaTupleIP, ip)
	tuple = appendNest(tuple, ctaTupleProto, proto)
	attrs := appendNest(nil, ctaTupleOrig, tuple)
	if zone != 0 {
		attrs = appendAttr(attrs, ctaZone, be16(zone)...)
	}
	return attrs, nil
}

// hasAttr reports whether typ is among attrs.
func hasAttr(attrs []byte, typ uint16) bool {
	for len(attrs) > 0 {
		t, _, rest, ok := nextAttr(attrs)
		if !ok {
			return false
		}
		if t == typ {
			return true
		}
		attrs = rest
	}
	return false
}

// query sends one request, which must be a dump or ask for an acknowledgement, and calls fn
// for each message of the answer; msg begins at nfgenmsg. The error is the kernel's errno
// or that of the socket.
func (q *Queries) query(typ uint16, flags netlink.HeaderFlags, family uint8, attrs []byte, fn func(h header, msg []byte)) error {
	if typ == ipctnlMsgCTDelete && !(hasAttr(attrs, ctaTupleOrig) && hasAttr(attrs, ctaID)) {
		return errFlush
	}
	if err := q.open(); err != nil {
		return err
	}
	if err := q.conn.SetWriteDeadline(time.Now().Add(q.cfg.Timeout)); err != nil {
		return q.fail(err)
	}
	req, err := q.conn.Send(netlink.Message{
		Header: netlink.Header{
			Type:  netlink.HeaderType(ctType(typ)),
			Flags: netlink.Request | flags,
		},
		Data: append([]byte{family, unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		return q.fail(err)
	}
	for {
		b, err := q.next()
		if err != nil {
			return q.fail(err)
		}
		for len(b) > 0 {
			h, msg, rest, ok := nextMessage(b)
			if !ok {
				return q.fail(errMalformed)
			}
			b = rest
			if h.seq != req.Header.Sequence {
				continue
			}
			msg = msg[unix.NLMSG_HDRLEN:]
			switch h.typ {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				// Both begin with an errno, 0 for success.
				if len(msg) < 4 {
					return q.fail(errMalformed)
				}
				if errno := int32(binary.NativeEndian.Uint32(msg)); errno < 0 {
					return syscall.Errno(-errno)
				}
				return nil
			case ctType(ipctnlMsgCTNew), ctType(ipctnlMsgCTGetStats):
				if fn != nil {
					fn(h, msg)
				}
			}
		}
	}
}

func (q *Queries) fail(err error) error {
	_ = q.reset()
	return err
}

// next returns the next datagram; it is valid until the next call.
func (q *Queries) next() ([]byte, error) {
	if err := q.conn.SetReadDeadline(time.Now().Add(q.cfg.Timeout)); err != nil {
		return nil, err
	}
	if err := q.rc.Read(q.receive); err != nil {
		return nil, err
	}
	return q.buf[:max(q.n, 0)], os.NewSyscallError("read", q.err)
}

// read reads one datagram (syscall.RawConn).
func (q *Queries) read(fd uintptr) bool {
	for {
		q.n, q.err = unix.Read(int(fd), q.buf)
		if q.err != unix.EINTR {
			return q.err != unix.EAGAIN
		}
	}
}
