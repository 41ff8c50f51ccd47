//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

const (
	// buffer is the size of the socket's buffers. The library grows them
	// itself, but not when it is given an option.
	buffer = 1 << 20

	// maxFD is the first descriptor that the library cannot select(2) on: it
	// would panic.
	maxFD = unix.FD_SETSIZE
)

// A conn is a lasting connection to nftables. It is not safe for concurrent
// use. It has no deadline, and needs none: the kernel has answered when a request is
// sent, and the library reads what is there. It does so again and again, for ever, where
// a read fails at once, as one does for a process that was stopped beyond a deadline.
type conn struct {
	*nftables.Conn
	nl *netlink.Conn
}

func dial(netns int) (*conn, error) {
	c := &conn{}
	nft, err := nftables.New(nftables.AsLasting(), nftables.WithNetNSFd(netns),
		nftables.WithSockOptions(func(nl *netlink.Conn) error {
			c.nl = nl
			return errors.Join(nl.SetReadBuffer(buffer), nl.SetWriteBuffer(buffer), usable(nl))
		}))
	if err != nil {
		if c.nl != nil {
			_ = c.nl.Close()
		}
		return nil, fmt.Errorf("dial nftables: %w", nfnl.Permitted(err))
	}
	c.Conn = nft
	return c, nil
}

func usable(nl *netlink.Conn) error {
	raw, err := nl.SyscallConn()
	if err != nil {
		return err
	}
	return errors.Join(raw.Control(func(fd uintptr) {
		if fd >= maxFD {
			err = fmt.Errorf("descriptor %d is too high, %d and more files are open: %w", fd, maxFD, unix.EMFILE)
		}
	}), err)
}
