//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

const (
	// queryTimeout bounds every wait for the kernel. It answers at once, so
	// this is only met when something is badly wrong.
	queryTimeout = 5 * time.Second

	// buffer is the size of the socket's buffers. The library grows them
	// itself, but not when it is given an option.
	buffer = 1 << 20

	// maxFD is the first descriptor that the library cannot select(2) on: it
	// would panic.
	maxFD = unix.FD_SETSIZE
)

// A conn is a lasting connection to nftables. It is not safe for concurrent
// use.
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

// begin gives the next exchanges their time.
func (c *conn) begin() error { return c.nl.SetDeadline(time.Now().Add(queryTimeout)) }

// end takes the deadline away again, for others who use the connection.
func (c *conn) end() error { return c.nl.SetDeadline(time.Time{}) }
