package elements

import (
	"time"

	"golang.org/x/sys/unix"
)

// Alive is a sign of life of the daemon: while its set has UDP, the kernel learns permissions
// and mappings by itself. So what a dead daemon left, and a saved copy of the tables, learn for
// a limited time only. It is not safe for concurrent use.
type Alive struct{ protocolSet }

// NewAlive returns the Alive of the tables of w.
func NewAlive(w *Writer) *Alive {
	a := &Alive{protocolSet{name: AliveSet, protocols: []byte{unix.IPPROTO_UDP}}}
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
	return a.renew(last)
}
