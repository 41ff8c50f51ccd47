package gateway

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A Watcher reports changes of links, addresses, routes or routing rules (rtnetlink(7))
// that may matter to a Network that was read.
type Watcher struct {
	nl     *netlink.Conn
	closed atomic.Bool
	known  atomic.Pointer[known] // nil while every message matters
}

// watched are the multicast groups, as the bits that bind(2) takes.
const watched = unix.RTMGRP_LINK |
	unix.RTMGRP_IPV4_IFADDR | unix.RTMGRP_IPV6_IFADDR |
	unix.RTMGRP_IPV4_ROUTE | unix.RTMGRP_IPV6_ROUTE | unix.RTMGRP_IPV4_RULE |
	1<<(unix.RTNLGRP_IPV6_RULE-1) | 1<<(unix.RTNLGRP_NEXTHOP-1)

// Watch begins to watch the network namespace behind the descriptor netns, or
// the calling thread's own when it is 0.
func Watch(netns int) (*Watcher, error) {
	nl, err := netlink.Dial(unix.NETLINK_ROUTE, &netlink.Config{NetNS: netns, Groups: watched})
	if err != nil {
		return nil, fmt.Errorf("watch links: %w", err)
	}
	return &Watcher{nl: nl}, nil
}

// settle is how long it must be quiet before Wait returns: one change of a link causes many
// messages. settleMost bounds the wait if routes change all the time.
const (
	settle     = 20 * time.Millisecond
	settleMost = 500 * time.Millisecond
)

// Know sets the Network that was read, and the links that the user names. Wait skips
// messages that change nothing in n, until one that does. From then on every message
// matters until Know is called again, because the next Network may be older than a message.
// If ways is set, it also matters by which outside link packets leave.
func (w *Watcher) Know(n Network, named []string, ways bool) { w.known.Store(newKnown(n, named, ways)) }

// Wait returns nil when something has changed since the last call, or messages were lost.
func (w *Watcher) Wait() error {
	for matters := false; !matters; {
		var err error
		if matters, err = w.receive(time.Time{}); err != nil {
			return err
		}
	}
	for most := time.Now().Add(settleMost); time.Now().Before(most); {
		_, err := w.receive(time.Now().Add(settle))
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// receive reads the next messages, and reports whether one of them matters.
func (w *Watcher) receive(deadline time.Time) (matters bool, err error) {
	if err := w.nl.SetReadDeadline(deadline); err != nil {
		return false, w.fail(err)
	}
	messages, err := w.nl.Receive()
	switch {
	case errors.Is(err, unix.ENOBUFS):
		matters = true // a lost message may matter
	case err != nil:
		return false, w.fail(err)
	default:
		k := w.known.Load()
		matters = k == nil || slices.ContainsFunc(messages, k.matters)
	}
	if matters {
		w.known.Store(nil)
	}
	return matters, nil
}

// fail returns os.ErrClosed in place of any error of a closed connection.
func (w *Watcher) fail(err error) error {
	if err != nil && w.closed.Load() {
		return os.ErrClosed
	}
	return err
}

// Close ends a Wait. A second Close does nothing.
func (w *Watcher) Close() error {
	if w.closed.Swap(true) {
		return nil
	}
	return w.nl.Close()
}
