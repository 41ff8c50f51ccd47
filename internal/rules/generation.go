//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// generations tell when somebody else changed nftables. The kernel numbers the
// transactions of a network namespace that change something, and a batch asks to be
// told the number of its own (nf_tables_gen_notify). A transaction that changes
// nothing, for its elements stand already, has none. So each number that was not
// told to us is somebody else's, or that of a transaction that did not ask.
//
// Linux before 5.10.20 tells the number only while somebody listens to nftables:
// there every change counts as somebody else's.
type generations struct {
	seen   uint32 // the last one that was ours, or that was looked at
	others uint32 // goes up when one before it was not ours
}

// ours notes a transaction of ours.
func (g *generations) ours(id uint32) {
	if id != g.seen+1 {
		g.others++
	}
	g.seen = id
}

// look notes the present generation.
func (g *generations) look(id uint32) {
	if id != g.seen {
		g.others++
	}
	g.seen = id
}

// Changed reports whether somebody else may have changed nftables since the last
// call; the first one returns true, and so does the one after a Set or Remove that
// changed our tables. A transaction of the Map or the Mappings is never taken for
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
	n, err := t.w.others(t.look)
	changed := err == nil && n != t.others
	if err == nil {
		t.others = n
	}
	return changed, err
}

// others returns a number that is another one when somebody else changed nftables
// since the last call, by whomever. It asks the kernel by c.
func (w *writer) others(c *nfnl.Conn) (uint32, error) {
	// Locked, so that no transaction of ours is under way.
	w.Lock()
	defer w.Unlock()
	id, err := generation(c)
	if err != nil {
		return 0, fmt.Errorf("read generation of nftables: %w", nfnl.Permitted(err))
	}
	w.generations.look(id)
	return w.generations.others, nil
}

// generation reads the number of the last transaction.
func generation(c *nfnl.Conn) (id uint32, err error) {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, unix.NLM_F_REQUEST, c.NextSeq(1), unix.AF_UNSPEC)
	e.End()
	err = errors.New("no answer")
	failure := c.Exchange(&e, func(_ uint32, refused error) { err = refused }, func(typ uint16, body []byte) {
		if n, ok := generationOf(typ, body); ok {
			id, err = n, nil
		}
	})
	return id, errors.Join(err, failure)
}

// generationOf reads the number in a message of the kernel that tells one.
func generationOf(typ uint16, body []byte) (id uint32, ok bool) {
	if typ != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN || len(body) < nfgenmsgLen {
		return 0, false
	}
	attributes(body[nfgenmsgLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_GEN_ID && len(b) == 4 {
			id, ok = binary.BigEndian.Uint32(b), true
		}
	})
	return id, ok
}
