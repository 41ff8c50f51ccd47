package elements

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A protocolSet is a set in which rules look up the protocol of a flow: its elements say for a
// time that something holds for flows of these protocols.
type protocolSet struct {
	batcher
	name      string
	protocols []byte
}

// renew makes the elements last for a time from now on.
func (s *protocolSet) renew(last time.Duration) error {
	err := s.send(last, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // before Linux 6.12, adding alone renews nothing
	if errors.Is(err, unix.ENOENT) {
		err = s.send(last, unix.NFT_MSG_NEWSETELEM)
	}
	if err != nil {
		return fmt.Errorf("add element to set %s: %w", s.name, nfnl.Permitted(err))
	}
	return nil
}

// send sends messages about each of the elements.
func (s *protocolSet) send(last time.Duration, messages ...uint16) error {
	errs := s.errs[:len(s.protocols)]
	clear(errs)
	transact(&s.batcher, s.protocols, uint32(len(messages)), func(seq uint32, protocol *byte) {
		for i, typ := range messages {
			list, element := s.openElement(s.name, seq+uint32(i), typ, 0)
			s.data(unix.NFTA_SET_ELEM_KEY, []byte{*protocol})
			s.closeElement(list, element, typ, last)
		}
	})
	return errors.Join(errs...)
}
