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
type Lean struct{ protocolSet }

// NewLean returns the Lean of the tables of w.
func NewLean(w *Writer) *Lean {
	l := &Lean{protocolSet{name: LeanSet, protocols: []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP}}}
	l.begin(w)
	return l
}

// On keeps the kernel from reporting such flows, for LeanTimeout.
func (l *Lean) On() error { return l.renew(LeanTimeout) }

// Off lets the kernel report all flows.
func (l *Lean) Off() error {
	if err := l.send(LeanTimeout, unix.NFT_MSG_DELSETELEM); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("delete element of set %s: %w", LeanSet, nfnl.Permitted(err))
	}
	return nil
}
