package elements

import (
	"fmt"
	"sync"

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
	id, err := nfnl.Generation(c)
	if err != nil {
		return 0, fmt.Errorf("read generation of nftables: %w", nfnl.Permitted(err))
	}
	w.generations.look(id)
	return w.generations.others, nil
}
