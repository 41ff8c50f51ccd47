package rules

import "github.com/conenatd/conenatd/internal/nfnl"

// Changed reports whether somebody else may have changed nftables since the last call. It
// also returns true on the first call, and after a Set or Remove that changed our tables. A
// transaction about elements never counts as somebody else's change, nor does it hide one.
//
// Changed costs one query. A subscription to nftables events would instead deliver one
// event for each element that we add or delete.
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

// OthersChanges returns a number that differs from that of the last call if somebody else
// changed nftables in between; it does not matter who called. It asks the kernel over c,
// and may be called from any goroutine.
func (t *Tables) OthersChanges(c *nfnl.Conn) (uint32, error) { return t.w.Others(c) }
