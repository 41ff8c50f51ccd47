package elements

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Direction is the source and the destination of a flow as it began.
type Direction struct{ Src, Dst cone.Endpoint }

// Unsure are the flows whose source may be spoofed: the kernel adds them by itself. It is
// not safe for concurrent use.
type Unsure struct{ batcher }

// NewUnsure returns the flows in the tables of w.
func NewUnsure(w *Writer) *Unsure {
	u := &Unsure{}
	u.begin(w)
	return u
}

// List calls f for every flow. It has a connection of its own.
func (u *Unsure) List(f func(Direction)) error {
	return u.w.list(UnsureSet, func(key, _ []byte, _ time.Duration) {
		if len(key) == flowKeyLen {
			f(Direction{Src: endpoint(key), Dst: endpoint(key[8:])})
		}
	})
}

// Renew renews flows that List told of.
func (u *Unsure) Renew(flows []Direction) {
	_ = u.send(flows, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // some may have ended
}

// Add adds flows that List told of, of other tables. They are forgotten where these
// tables have no such set.
func (u *Unsure) Add(flows []Direction) error {
	if err := u.send(flows, unix.NFT_MSG_NEWSETELEM); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// send sends messages about each of the flows, and returns the first error.
func (u *Unsure) send(flows []Direction, messages ...uint16) (first error) {
	for part := range slices.Chunk(flows, batch) {
		clear(u.errs[:])
		transact(&u.batcher, part, uint32(len(messages)), func(seq uint32, d *Direction) {
			for i, typ := range messages {
				u.flow(seq+uint32(i), typ, d)
			}
		})
		for _, err := range u.errs[:len(part)] {
			if err != nil && first == nil {
				first = fmt.Errorf("add element to set %s: %w", UnsureSet, nfnl.Permitted(err))
			}
		}
	}
	return first
}

const flowKeyLen = 16

// flow appends a message about a flow in the set.
func (u *Unsure) flow(seq uint32, typ uint16, d *Direction) {
	e := &u.enc
	list, element := u.openElement(UnsureSet, seq, typ, 0)
	key := e.Nest(unix.NFTA_SET_ELEM_KEY)
	e.Attr(unix.NFTA_DATA_VALUE, flowKeyLen)
	for _, x := range []cone.Endpoint{d.Src, d.Dst} {
		e.B = append(e.B, x.Addr[12:]...)
		e.B = binary.BigEndian.AppendUint16(e.B, x.Port)
		e.Pad()
	}
	e.EndNest(key)
	e.EndNest(element)
	e.EndNest(list)
	e.End()
}
