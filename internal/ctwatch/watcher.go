package ctwatch

import (
	"cmp"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// DefaultReadBuffer is the receive buffer of a Watcher in bytes.
const DefaultReadBuffer = 8 << 20

// A Config says where and how to open a socket. The zero value is the current
// network namespace with default sizes.
type Config struct {
	// NetNS is a file descriptor of a network namespace, 0 for the current one. It must
	// stay open as long as a Queries that uses it.
	NetNS int
	// ReadBuffer is the size of a Watcher's receive buffer in bytes, 0 for
	// DefaultReadBuffer. With CAP_NET_ADMIN it may exceed net.core.rmem_max. Queries does
	// not use it: the kernel adapts a dump to the buffer.
	ReadBuffer int
	// Timeout is how long Queries waits for each part of an answer, 0 for
	// DefaultTimeout. A Watcher does not use it.
	Timeout time.Duration
}

// A Kind says what an Event tells.
type Kind uint8

// The kinds of events.
const (
	// New is a flow that was confirmed: its first packet is about to leave.
	New Kind = iota + 1
	// Gone is a flow that was destroyed. Expiry is reported up to a minute late, when the
	// garbage collector runs.
	Gone
	// Overrun says that events were lost; Flow is zero. It comes after all events that were
	// queued before the loss, once the kernel delivers again, so a dump made now misses
	// nothing.
	Overrun
)

func (k Kind) String() string {
	switch k {
	case New:
		return "new"
	case Gone:
		return "gone"
	case Overrun:
		return "overrun"
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// An Event is one report from the conntrack table.
type Event struct {
	Kind Kind
	Flow cone.Flow
}

// Stats are the counters of a Watcher since Dial.
type Stats struct {
	// Received counts events of kind New and Gone.
	Received uint64
	// Filtered counts messages that passed the socket filter but were not events of a UDP
	// flow. The kernel does not report what the filter dropped.
	Filtered uint64
	// Malformed counts messages that could not be decoded.
	Malformed uint64
	// Overruns counts ENOBUFS errors; each stands for an unknown number of lost events.
	Overruns uint64
	// ReadBuffer is the receive buffer that the kernel gave, in the unit of
	// Config.ReadBuffer (the kernel itself counts twice that, for overhead).
	ReadBuffer int
}

// A Watcher reports UDP flows that begin and end, and anchors that end. One goroutine may
// call Read; all other methods are safe at any time.
type Watcher struct {
	conn    socket
	rc      syscall.RawConn
	filter  *netlink.Conn         // conn, which runs a filter before messages are queued; nil in tests
	receive func(fd uintptr) bool // w.read, bound once: binding allocates
	poll    func(fd uintptr)      // the same, regardless of the deadline

	// Used by Read alone.
	buf     []byte
	rest    []byte  // messages of the last datagram that did not fit into events
	events  []Event // what the running Read fills
	n       int
	err     error
	overrun bool // to be reported as soon as the queue is empty
	emptied time.Time

	mu       sync.Mutex // guards deadline and woken
	deadline time.Time
	woken    bool

	closed                                  atomic.Bool
	received, filtered, malformed, overruns atomic.Uint64
	readBuffer                              int
	port                                    uint32 // the netlink port ID
}

// socket is the part of a netlink.Conn that a Watcher uses while it runs.
type socket interface {
	syscall.Conn
	SetReadDeadline(time.Time) error
	Close() error
}

var errClosed error = closedError{}

// closedError matches both os.ErrClosed and net.ErrClosed: after Close of a socket callers
// may look for either.
type closedError struct{}

func (closedError) Error() string { return "conntrack socket is closed" }

func (closedError) Is(err error) bool { return err == os.ErrClosed || err == net.ErrClosed }

// Dial opens the event socket. It needs CAP_NET_ADMIN in the user namespace
// that owns the network namespace.
func Dial(cfg Config) (*Watcher, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: cfg.NetNS})
	if err != nil {
		return nil, wrap("open conntrack event socket", err)
	}
	w, err := newWatcher(conn)
	if err == nil {
		w.filter, w.port = conn, conn.PID()
		err = w.subscribe(conn, cfg)
	}
	if err != nil {
		_ = conn.Close()
		return nil, err
	}
	return w, nil
}

// subscribe prepares the socket and joins the groups.
func (w *Watcher) subscribe(conn *netlink.Conn, cfg Config) error {
	// This uses SO_RCVBUFFORCE, or SO_RCVBUF without the privilege.
	if err := conn.SetReadBuffer(cmp.Or(cfg.ReadBuffer, DefaultReadBuffer)); err != nil {
		return wrap("set receive buffer", err)
	}
	size, err := conn.ReadBuffer()
	if err != nil {
		return wrap("get receive buffer", err)
	}
	w.readBuffer = size / 2
	// If this option were set, a loss would go unnoticed.
	if err := conn.SetOption(netlink.NoENOBUFS, false); err != nil {
		return wrap("clear NETLINK_NO_ENOBUFS", err)
	}
	// Attach the filter before joining the groups, so that nothing passes unfiltered.
	if err := w.attach(Sources{}); err != nil {
		return err
	}
	// Join DESTROY first: then every flow that is seen to begin is also seen to end.
	for _, group := range []uint32{unix.NFNLGRP_CONNTRACK_DESTROY, unix.NFNLGRP_CONNTRACK_NEW} {
		if err := conn.JoinGroup(group); err != nil {
			return wrap("join conntrack event group", err)
		}
	}
	return nil
}

func newWatcher(conn socket) (*Watcher, error) {
	rc, err := conn.SyscallConn()
	if err != nil {
		return nil, wrap("get raw connection", err)
	}
	// An event is a few hundred bytes; nothing near this size exists.
	w := &Watcher{conn: conn, rc: rc, buf: make([]byte, 64<<10)}
	w.receive = w.read
	w.poll = func(fd uintptr) { w.read(fd) }
	return w, nil
}

// wrap returns err as "what: err", and for EPERM adds the privilege that is needed.
func wrap(what string, err error) error {
	if errors.Is(err, unix.EPERM) {
		return fmt.Errorf("%s: %w (run as root or with CAP_NET_ADMIN)", what, err)
	}
	return fmt.Errorf("%s: %w", what, err)
}

// Read waits for an event, then fills events with what is queued, without waiting again,
// and returns how many it filled. It does not allocate. Lost events (Overrun) and messages
// that cannot be decoded are not errors.
//
// If the deadline has passed, or Wake was called, it returns what is queued. If that is
// nothing, it returns 0 and os.ErrDeadlineExceeded. After Close it returns an error that is
// both os.ErrClosed and net.ErrClosed.
func (w *Watcher) Read(events []Event) (int, error) {
	if len(events) == 0 {
		return 0, nil
	}
	w.events, w.n, w.err = events, 0, nil
	w.parseRest()
	err := w.rc.Read(w.receive)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		w.awake()
		// Poll once even after a wake-up or a missed deadline; otherwise a loop that is
		// always woken never reads.
		if failed := cmp.Or(w.rc.Control(w.poll), w.err); failed != nil {
			err = failed
		}
	}
	w.events = nil

	switch {
	case w.n > 0:
		return w.n, nil // the next Read meets the error again
	case w.closed.Load():
		return 0, errClosed
	case errors.Is(err, os.ErrDeadlineExceeded):
		return 0, os.ErrDeadlineExceeded
	case err == nil:
		err = w.err
	}
	return 0, wrap("read conntrack events", err)
}

// Emptied returns a time at which nothing was queued, the last one before Read returned; the zero
// time if there was none. What a later Read returns was queued after it. Only the goroutine that
// calls Read may call it.
func (w *Watcher) Emptied() time.Time { return w.emptied }

// read reads datagrams until the queue is empty or w.events is full. It returns false to be
// called again when there is more to read (syscall.RawConn).
func (w *Watcher) read(fd uintptr) bool {
	looked := time.Now() // before: the process may be stopped when the kernel has answered
	for w.n < len(w.events) {
		n, err := unix.Read(int(fd), w.buf)
		switch err {
		case nil:
			w.rest = w.buf[:n]
			w.parseRest()
		case unix.EINTR:
		case unix.EAGAIN:
			w.emptied = looked
			w.tellOverrun()
			return w.n > 0
		case unix.ENOBUFS:
			// The kernel queues nothing until the queue was read empty (netlink_overrun,
			// netlink_rcv_wake), so report the overrun only then; at the latest here, since
			// a second loss means that the queue was empty.
			w.tellOverrun()
			w.overrun = true
			w.overruns.Add(1)
		default:
			w.err = os.NewSyscallError("read", err)
			return true
		}
	}
	return true
}

func (w *Watcher) tellOverrun() {
	if w.overrun {
		w.overrun = false
		w.events[w.n] = Event{Kind: Overrun}
		w.n++
	}
}

// parseRest turns w.rest into events, as many as w.events has room for.
func (w *Watcher) parseRest() {
	for len(w.rest) > 0 && w.n < len(w.events) {
		h, msg, rest, ok := nfnl.NextMessage(w.rest)
		w.rest = rest
		if !ok {
			w.malformed.Add(1)
			return
		}
		ev := &w.events[w.n]
		kind, err := parse(h, msg, &ev.Flow)
		switch err {
		case nil:
			ev.Kind = kind
			w.n++
			w.received.Add(1)
		case errForeign:
			w.filtered.Add(1)
		default:
			w.malformed.Add(1)
		}
	}
}

// SetReadDeadline sets the time at which a Read gives up, even one that is waiting already.
// The zero time means never.
func (w *Watcher) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = t
	if w.woken {
		return nil // the Read that sees the wake-up sets it
	}
	return w.conn.SetReadDeadline(t)
}

// Wake makes one Read return without waiting: the one that is waiting, else the next. A
// concurrent SetReadDeadline does not undo it. Calls before that Read returns count as one.
func (w *Watcher) Wake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.woken = true
	// It fails only if the socket is closed, and then Read returns anyway.
	_ = w.conn.SetReadDeadline(time.Unix(0, 1))
}

// SetSources makes w report, from now on, only the events of s. If s is more than the
// kernel accepts, w reports all flows. Anchors begin in one of the prefixes. Events that
// are left out cost the process nothing.
func (w *Watcher) SetSources(s Sources) error {
	// The memory for a socket's filters is limited (net.core.optmem_max), and the old
	// filter counts until it is detached. The parser looks at what passes meanwhile.
	if err := w.filter.RemoveBPF(); err != nil {
		return wrap("detach socket filter", err)
	}
	err := w.attach(s)
	for most := mostForwarded / 2; errors.Is(err, unix.ENOMEM) && most >= leastForwarded; most /= 2 {
		s.Forwarded, s.Served = fewer(s.Forwarded, most), s.Served[:min(len(s.Served), most*mostServed/mostForwarded)]
		err = w.attach(s)
	}
	if errors.Is(err, unix.ENOMEM) {
		err = w.attach(Sources{})
	}
	return err
}

func (w *Watcher) attach(s Sources) error {
	prog, err := eventFilter(s)
	if err != nil {
		return wrap("assemble socket filter", err)
	}
	if err := w.filter.SetBPF(prog); err != nil {
		return wrap("attach socket filter", err)
	}
	return nil
}

// awake ends a wake-up and restores the deadline.
func (w *Watcher) awake() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.woken {
		w.woken = false
		_ = w.conn.SetReadDeadline(w.deadline)
	}
}

// Stats returns the counters.
func (w *Watcher) Stats() Stats {
	return Stats{
		Received:   w.received.Load(),
		Filtered:   w.filtered.Load(),
		Malformed:  w.malformed.Load(),
		Overruns:   w.overruns.Load(),
		ReadBuffer: w.readBuffer,
	}
}

// Close ends the subscription and a Read that waits. A second Close does
// nothing.
func (w *Watcher) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	return w.conn.Close()
}
