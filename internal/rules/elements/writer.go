package elements

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Writer is the one connection that writes the tables with a given name: the kernel lets
// no other connection write tables that it owns. Each transaction over it is made with the
// lock held.
type Writer struct {
	sync.Mutex
	batch       *nfnl.Conn
	netns       int
	table       string
	generations generations
}

// NewWriter returns a Writer for the tables with that name in the network namespace behind
// the descriptor netns, 0 for the current one. Others may use c while they hold the lock.
func NewWriter(c *nfnl.Conn, netns int, table string) *Writer {
	return &Writer{batch: c, netns: netns, table: table}
}

// generations detect that somebody else changed nftables. The kernel numbers the
// transactions of a network namespace that change something, and a batch asks for its own
// number (nf_tables_gen_notify). A transaction that changes nothing, because its elements
// exist already, has no number. So each number that we were not told belongs to somebody
// else, or to a transaction of ours that did not ask.
//
// Linux before 5.10.20 tells the number only while somebody listens to nftables: there
// every change counts as somebody else's.
type generations struct {
	seen   uint32 // the last number that was ours or that look saw
	others uint32 // increases when an earlier number was not ours
}

// ours records a transaction of ours.
func (g *generations) ours(id uint32) {
	if id != g.seen+1 {
		g.others++
	}
	g.seen = id
}

// look records the current generation.
func (g *generations) look(id uint32) {
	if id != g.seen {
		g.others++
	}
	g.seen = id
}

// Others returns a number that differs from that of the last call if somebody else changed
// nftables in between; it does not matter who called. It asks the kernel over c.
func (w *Writer) Others(c *nfnl.Conn) (uint32, error) {
	// Hold the lock, so that no transaction of ours is under way.
	w.Lock()
	defer w.Unlock()
	id, err := Generation(c)
	if err != nil {
		return 0, fmt.Errorf("read generation of nftables: %w", nfnl.Permitted(err))
	}
	w.generations.look(id)
	return w.generations.others, nil
}

// Generation reads the number of the last transaction.
func Generation(c *nfnl.Conn) (id uint32, err error) {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, unix.NLM_F_REQUEST, c.NextSeq(1), unix.AF_UNSPEC)
	e.End()
	answered := false
	err = c.Ask(&e, func(typ uint16, body []byte) {
		if n, ok := generationOf(typ, body); ok {
			id, answered = n, true
		}
	})
	if err == nil && !answered {
		err = errors.New("no answer")
	}
	return id, err
}

// generationOf reads the number from a message of the kernel that contains one.
func generationOf(typ uint16, body []byte) (id uint32, ok bool) {
	if typ != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN || len(body) < nfnl.FamilyHeaderLen {
		return 0, false
	}
	nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_GEN_ID && len(b) == 4 {
			id, ok = binary.BigEndian.Uint32(b), true
		}
	})
	return id, ok
}
