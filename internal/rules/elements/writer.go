package elements

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Writer is the connection by which the tables of one name are written, as the kernel
// lets nobody else write what it owns. Each transaction by it is made while it is locked.
type Writer struct {
	sync.Mutex
	batch       *nfnl.Conn
	netns       int
	table       string
	generations generations
}

// NewWriter returns a Writer for the tables of a name in the network namespace behind the
// descriptor netns, 0 for the current one. Others may use c while they hold the lock.
func NewWriter(c *nfnl.Conn, netns int, table string) *Writer {
	return &Writer{batch: c, netns: netns, table: table}
}

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

// Others returns a number that is another one when somebody else changed nftables
// since the last call, by whomever. It asks the kernel by c.
func (w *Writer) Others(c *nfnl.Conn) (uint32, error) {
	// Locked, so that no transaction of ours is under way.
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
