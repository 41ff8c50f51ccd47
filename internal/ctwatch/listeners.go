package ctwatch

import (
	"bufio"
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
	n, err := listeners(f, w.port)
	if err != nil {
		return 0, fmt.Errorf("look for listeners to conntrack: %s: %w", socketList, err)
	}
	return n, nil
}

// listeners counts the sockets in a list of netlink_seq_show that receive conntrack events of
// flows, without the one with the given port ID.
func listeners(list io.Reader, but uint32) (n int, err error) {
	const ofFlows = 1<<(unix.NFNLGRP_CONNTRACK_NEW-1) | 1<<(unix.NFNLGRP_CONNTRACK_UPDATE-1) | 1<<(unix.NFNLGRP_CONNTRACK_DESTROY-1)
	lines := bufio.NewScanner(list)
	lines.Scan() // the names of the columns
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 4 {
			return 0, fmt.Errorf("line %q has no groups", lines.Text())
		}
		if fields[1] != strconv.Itoa(unix.NETLINK_NETFILTER) {
			continue
		}
		port, bad := strconv.ParseUint(fields[2], 10, 32)
		groups, worse := strconv.ParseUint(fields[3], 16, 32)
		if bad != nil || worse != nil {
			return 0, fmt.Errorf("line %q has no port and groups", lines.Text())
		}
		if groups&ofFlows != 0 && uint32(port) != but {
			n++
		}
	}
	return n, lines.Err()
}
