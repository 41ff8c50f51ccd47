package ctwatch

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// socketList shows the netlink sockets of the calling thread's network namespace.
const socketList = "/proc/thread-self/net/netlink"

// OtherListeners returns how many sockets besides w receive conntrack events of flows in the
// network namespace of the calling thread, which must be that of w. It cannot see sockets of
// other namespaces that listen to this one (NETLINK_LISTEN_ALL_NSID).
func (w *Watcher) OtherListeners() (int, error) {
	f, err := os.Open(socketList)
	if err != nil {
		return 0, fmt.Errorf("look for listeners to conntrack: %w", err)
	}
	defer func() { _ = f.Close() }()
	all, err := Listeners(f)
	if err != nil {
		return 0, fmt.Errorf("look for listeners to conntrack: %s: %w", socketList, err)
	}
	n := 0
	for _, l := range all {
		if l.Port != w.port {
			n++
		}
	}
	return n, nil
}

// A Listener is a socket that receives conntrack events of flows.
type Listener struct {
	Port  uint32 // its netlink port ID
	Inode uint64 // of the socket: the links in /proc/PID/fd have it
}

// Listeners returns the sockets in a list such as /proc/net/netlink (netlink_seq_show) that
// receive conntrack events of flows.
func Listeners(list io.Reader) (all []Listener, err error) {
	const ofFlows = 1<<(unix.NFNLGRP_CONNTRACK_NEW-1) | 1<<(unix.NFNLGRP_CONNTRACK_UPDATE-1) | 1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)
	const protocol, port, groups, inode, columns = 1, 2, 3, 9, 10
	lines := bufio.NewScanner(list)
	lines.Scan() // the names of the columns
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < columns {
			return nil, fmt.Errorf("line %q has %d columns, want %d", lines.Text(), len(fields), columns)
		}
		if fields[protocol] != strconv.Itoa(unix.NETLINK_NETFILTER) {
			continue
		}
		id, bad := strconv.ParseUint(fields[port], 10, 32)
		joined, worse := strconv.ParseUint(fields[groups], 16, 32)
		node, worst := strconv.ParseUint(fields[inode], 10, 64)
		if err := errors.Join(bad, worse, worst); err != nil {
			return nil, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		if joined&ofFlows != 0 {
			all = append(all, Listener{Port: uint32(id), Inode: node})
		}
	}
	return all, lines.Err()
}
