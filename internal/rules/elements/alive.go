package elements

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Alive is a sign of life of the daemon: while its set has UDP, the kernel learns permissions
// and mappings by itself. So what a dead daemon left, and a saved copy of the tables, learn for
// a limited time only. It is not safe for concurrent use.
type Alive struct{ batcher }

// NewAlive returns the Alive of the tables of w.
func NewAlive(w *Writer) *Alive {
	a := &Alive{}
	a.begin(w)
	return a
}

// Keep makes the sign of life last for a time, if less than half of that is left: so it is
// seldom a transaction.
func (a *Alive) Keep(last time.Duration) error {
	var left time.Duration
	if err := a.w.list(AliveSet, func(_, _ []byte, l time.Duration) { left = max(left, l) }); err != nil {
		return err
	}
	if left >= last/2 {
		return nil
	}
	err := a.send(last, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // before Linux 6.12, adding alone renews nothing
	if errors.Is(err, unix.ENOENT) {
		err = a.send(last, unix.NFT_MSG_NEWSETELEM)
	}
	if err != nil {
		return fmt.Errorf("add element to set %s: %w", AliveSet, nfnl.Permitted(err))
	}
	return nil
}

func (a *Alive) send(last time.Duration, messages ...uint16) error {
	a.errs[0] = nil
	transact(&a.batcher, []byte{unix.IPPROTO_UDP}, uint32(len(messages)), func(seq uint32, protocol *byte) {
		for i, typ := range messages {
			list, element := a.openElement(AliveSet, seq+uint32(i), typ, 0)
			a.data(unix.NFTA_SET_ELEM_KEY, []byte{*protocol})
			a.closeElement(list, element, typ, last)
		}
	})
	return a.errs[0]
}
