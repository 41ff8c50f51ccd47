package elements

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Direction is the source and the destination of a flow in its original direction.
type Direction struct{ Src, Dst cone.Endpoint }

// Unsure are the flows whose source may be spoofed. The kernel adds them by itself. It is
// not safe for concurrent use.
type Unsure struct{ v4, v6 unsureSet }

// An unsureSet has the flows of one IP version.
type unsureSet struct {
	batcher
	name string
	size int // of an address
}

// NewUnsure returns the unsure flows in the tables of w.
func NewUnsure(w *Writer) *Unsure {
	u := &Unsure{v4: unsureSet{name: UnsureSet, size: net.IPv4len}, v6: unsureSet{name: Unsure6Set, size: net.IPv6len}}
	u.v4.begin(w)
	u.v6.begin(w)
	u.v6.family = unix.NFPROTO_INET
	return u
}

// List calls f for every flow. It uses its own connection.
func (u *Unsure) List(f func(Direction)) error { return errors.Join(u.v4.list(f), u.v6.list(f)) }

// Renew renews the timeouts of flows that List returned.
func (u *Unsure) Renew(flows []Direction) {
	v4, v6 := byVersion(flows)
	_ = u.v4.send(v4, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM) // some may have ended
	_ = u.v6.send(v6, unix.NFT_MSG_DELSETELEM, unix.NFT_MSG_NEWSETELEM)
}

// Add adds flows that List returned for other tables. They are dropped if these tables have
// no such set.
func (u *Unsure) Add(flows []Direction) error {
	v4, v6 := byVersion(flows)
	return errors.Join(u.v4.add(v4), u.v6.add(v6))
}

func byVersion(flows []Direction) (v4, v6 []Direction) {
	for _, d := range flows {
		if d.Src.Addr.Is4() {
			v4 = append(v4, d)
		} else {
			v6 = append(v6, d)
		}
	}
	return v4, v6
}

func (u *unsureSet) list(f func(Direction)) error {
	end := u.size + portWord
	return List(u.w.netns, u.family, u.w.table, u.name, func(b []byte) {
		if key := Key(b); len(key) == 2*end {
			f(Direction{Src: u.endpoint(key), Dst: u.endpoint(key[end:])})
		}
	})
}

// portWord is the size of a port in a key.
const portWord = 4

func (u *unsureSet) endpoint(b []byte) cone.Endpoint {
	if u.size == net.IPv4len {
		return endpoint(b)
	}
	return cone.Endpoint{Addr: cone.Addr(b[:net.IPv6len]), Port: binary.BigEndian.Uint16(b[net.IPv6len:])}
}

func (u *unsureSet) add(flows []Direction) error {
	if err := u.send(flows, unix.NFT_MSG_NEWSETELEM); !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// send sends messages about each of the flows, and returns the first error.
func (u *unsureSet) send(flows []Direction, messages ...uint16) (first error) {
	inBatches(&u.batcher, flows, uint32(len(messages)), func(seq uint32, d *Direction) {
		for i, typ := range messages {
			u.flow(seq+uint32(i), typ, d)
		}
	}, func(_ int, err error) {
		if err != nil && first == nil {
			first = fmt.Errorf("add element to set %s: %w", u.name, nfnl.Permitted(err))
		}
	})
	return first
}

// flow appends a message about a flow's element.
func (u *unsureSet) flow(seq uint32, typ uint16, d *Direction) {
	e := &u.enc
	list, element := u.openElement(u.name, seq, typ, 0)
	key := e.Nest(unix.NFTA_SET_ELEM_KEY)
	e.Attr(unix.NFTA_DATA_VALUE, 2*(u.size+portWord))
	for _, x := range []cone.Endpoint{d.Src, d.Dst} {
		e.B = append(e.B, x.Addr[len(x.Addr)-u.size:]...)
		e.B = binary.BigEndian.AppendUint16(e.B, x.Port)
		e.Pad()
	}
	e.EndNest(key)
	u.closeElement(list, element, typ, 0)
}
