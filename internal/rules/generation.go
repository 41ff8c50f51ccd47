//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A generation is the number of transactions that nftables has seen.
type generation struct {
	conn    *nfnl.Conn
	id      uint32
	commits uint32 // of ours, at that time
}

// Changed tells what happened since the last call. It costs one query; a
// subscription to the events of nftables would make each element that we add or
// delete cost an event.
func (t *Tables) Changed() (Change, error) {
	g := &t.gen
	if g.conn == nil {
		c, err := nfnl.Dial(t.netns)
		if err != nil {
			return Unchanged, err
		}
		g.conn = c
	}
	// Locked, so that no transaction of ours is under way.
	t.w.Lock()
	id, err := g.read()
	commits := t.w.commits
	t.w.Unlock()
	if err != nil {
		return Unchanged, fmt.Errorf("read generation of nftables: %w", nfnl.Permitted(err))
	}
	all, ours := id-g.id, commits-g.commits
	g.id, g.commits = id, commits
	switch {
	case all == 0:
		return Unchanged, nil
	case all <= ours:
		return OursAlone, nil
	}
	return SomebodyElses, nil
}

func (g *generation) read() (id uint32, err error) {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, unix.NLM_F_REQUEST, g.conn.NextSeq(1), unix.AF_UNSPEC)
	e.End()
	err = errors.New("no answer")
	failure := g.conn.Exchange(&e, func(_ uint32, refused error) { err = refused }, func(_ uint16, body []byte) {
		if len(body) < nfgenmsgLen {
			return
		}
		attributes(body[nfgenmsgLen:], func(typ uint16, b []byte) {
			if typ == unix.NFTA_GEN_ID && len(b) == 4 {
				id, err = binary.BigEndian.Uint32(b), nil
			}
		})
	})
	return id, errors.Join(err, failure)
}
