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
	// buffer is the size of the socket's buffers. The library grows them itself only if it
	// gets no socket options.
	buffer = 1 << 20

	// maxFD is the first descriptor that the library cannot pass to select(2); it would
	// panic.
	maxFD = unix.FD_SETSIZE
)

// A conn is a lasting connection to nftables. It is not safe for concurrent use. It has no
// deadline and needs none: the kernel has answered by the time a request is sent, and the
// library only reads what is queued. A deadline would do harm: if it passes while the
// process is stopped, each read fails at once, and the library retries for ever.
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
