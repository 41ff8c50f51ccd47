package elements

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Lean says whether the kernel reports flows that the daemon need not hear of: those whose
// permission it learned, and those that can have none. Rules look up the protocol of a flow
// in its set. It is not safe for concurrent use.
type Lean struct{ batcher }

// NewLean returns the Lean of the tables of w.
func NewLean(w *Writer) *Lean {
	l := &Lean{}
	l.begin(w)
	return l
}

// On keeps the kernel from reporting such flows, for LeanTimeout.
func (l *Lean) On() error {
	err := l.send(unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // before Linux 6.12, adding alone renews nothing
	if errors.Is(err, unix.ENOENT) {
		err = l.send(unix.NFT_MSG_NEWSETELEM)
	}
	if err != nil {
		return fmt.Errorf("add element to set %s: %w", LeanSet, nfnl.Permitted(err))
	}
	return nil
}

// Off lets the kernel report all flows.
func (l *Lean) Off() error {
	if err := l.send(unix.NFT_MSG_DELSETELEM); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete element of set %s: %w", LeanSet, nfnl.Permitted(err))
	}
	return nil
}

// send sends messages about each of the elements.
func (l *Lean) send(messages ...uint16) error {
	l.errs[0], l.errs[1] = nil, nil
	protocols := [...]byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP}
	transact(&l.batcher, protocols[:], uint32(len(messages)), func(seq uint32, protocol *byte) {
		for i, typ := range messages {
			list, element := l.openElement(LeanSet, seq+uint32(i), typ, 0)
			l.data(unix.NFTA_SET_ELEM_KEY, []byte{*protocol})
			l.closeElement(list, element, typ, LeanTimeout)
		}
	})
	return errors.Join(l.errs[0], l.errs[1])
}
