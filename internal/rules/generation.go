//go:build !(386 || arm || mips || mipsle)

package rules

import "github.com/conenatd/conenatd/internal/nfnl"

// Changed reports whether somebody else may have changed nftables since the last
// call; the first one returns true, and so does the one after a Set or Remove that
// changed our tables. A transaction about elements is never taken for
// somebody else's, nor does it hide one.
//
// It costs one query; a subscription to the events of nftables would make each
// element that we add or delete cost an event.
func (t *Tables) Changed() (bool, error) {
	if t.look == nil {
		c, err := nfnl.Dial(t.netns)
		if err != nil {
			return false, err
		}
		t.look = c
	}
	n, err := t.w.Others(t.look)
	changed := err == nil && n != t.others
	if err == nil {
		t.others = n
	}
	return changed, err
}

// OthersChanges returns a number that is another one when somebody else changed nftables
// since the last call, by whomever. It asks the kernel by c, and may be called from any
// goroutine.
func (t *Tables) OthersChanges(c *nfnl.Conn) (uint32, error) { return t.w.Others(c) }
