package elements

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Hidden says whether the kernel reports some flows that the daemon need not hear of. Rules
// look up the protocol of a flow in its set. It is not safe for concurrent use.
type Hidden struct{ protocolSet }

// NewLean returns the switch for UDP flows whose permission the kernel learned.
func NewLean(w *Writer) *Hidden { return newHidden(w, LeanSet, unix.IPPROTO_UDP) }

// NewQuiet returns the switch for flows that can have no permission.
func NewQuiet(w *Writer) *Hidden { return newHidden(w, QuietSet, unix.IPPROTO_UDP, unix.IPPROTO_TCP) }

func newHidden(w *Writer, name string, protocols ...byte) *Hidden {
	h := &Hidden{protocolSet{name: name, protocols: protocols}}
	h.begin(w)
	return h
}

// On keeps the kernel from reporting such flows, for LeanTimeout.
func (h *Hidden) On() error { return h.renew(LeanTimeout) }

// Off lets the kernel report all of them.
func (h *Hidden) Off() error {
	if err := h.send(LeanTimeout, unix.NFT_MSG_DELSETELEM); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete element of set %s: %w", h.name, nfnl.Permitted(err))
	}
	return nil
}
