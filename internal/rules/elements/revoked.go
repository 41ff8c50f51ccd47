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

// Revoked are the permissions that the user revoked: the next daemon must not restore them
// for existing flows. It is not safe for concurrent use.
type Revoked struct {
	batcher
	known map[cone.Key]time.Time // with the time of expiry, as far as this process knows
	swept time.Time              // when expired keys were last removed
}

// NewRevoked returns the revoked permissions in the tables of w.
func NewRevoked(w *Writer) *Revoked {
	r := &Revoked{known: make(map[cone.Key]time.Time)}
	r.begin(w)
	r.family = unix.NFPROTO_INET
	return r
}

// Adopt takes over what an earlier daemon added, and returns it. It uses its own
// connection.
func (r *Revoked) Adopt() (keys []cone.Key, err error) {
	now := time.Now()
	err = List(r.w.netns, r.family, r.w.table, RevokedSet, func(b []byte) {
		key, _, left := elementParts(b)
		if len(key) != revokedKeyLen {
			return
		}
		k := cone.Key{
			Peer: cone.Addr(key), Ext: cone.Endpoint{Addr: cone.Addr(key[16:]), Port: binary.BigEndian.Uint16(key[32:])},
			Zone: binary.BigEndian.Uint16(key[36:]), HostBits: uint8(binary.BigEndian.Uint16(key[40:])),
		}
		if _, known := r.known[k]; !known {
			keys = append(keys, k)
		}
		r.known[k] = now.Add(left)
	})
	return keys, err
}

// Add adds keys, as long as there is room, for two hours or until they are dropped. Before
// Linux 6.12, adding a key again does not extend its two hours. If the table is missing Add
// does nothing.
func (r *Revoked) Add(keys []cone.Key) error {
	now, full := time.Now(), error(nil)
	var errs []error
	for part := range slices.Chunk(keys, batch) {
		if !hasRoom(r.known, &r.swept, DeniedSize, slices.Values(part)) {
			full = ErrNoRoom
			continue
		}
		errs = append(errs, r.send(unix.NFT_MSG_NEWSETELEM, part, func(k cone.Key) { r.known[k] = now.Add(deniedTimeout) }))
	}
	return errors.Join(append(errs, full)...)
}

// Has reports whether k was added or adopted, and not dropped since then.
func (r *Revoked) Has(k cone.Key) bool {
	_, known := r.known[k]
	return known
}

// Drop drops keys. Some may have expired. A key that the kernel refuses to delete stays
// known, so that the next call tries again.
func (r *Revoked) Drop(keys []cone.Key) error {
	return r.send(unix.NFT_MSG_DELSETELEM, keys, func(k cone.Key) { delete(r.known, k) })
}

// Any reports whether there are keys for the next daemon.
func (r *Revoked) Any() bool {
	now := time.Now()
	for _, until := range r.known {
		if now.Before(until) {
			return true
		}
	}
	return false
}

// send sends a message about each of keys, and calls done for those that the kernel
// accepted.
func (r *Revoked) send(typ uint16, keys []cone.Key, done func(cone.Key)) error {
	var errs []error
	inBatches(&r.batcher, keys, 1, func(seq uint32, k *cone.Key) { r.element(seq, typ, k) }, func(i int, err error) {
		switch k := keys[i]; {
		case err == nil, typ == unix.NFT_MSG_DELSETELEM && errors.Is(err, unix.ENOENT):
			done(k)
		case errors.Is(err, unix.ENOENT): // the table will be made again, and k added again
		default:
			errs = append(errs, fmt.Errorf("change set %s for %v -> %v: %w", RevokedSet, k.Peer, k.Ext, nfnl.Permitted(err)))
		}
	})
	return errors.Join(errs...)
}

// revokedKeyLen is the length of peer . outside address . outside port . zone . number of
// host bits of the peer, with each part padded to a register's 4 bytes. IPv4 addresses are
// mapped into IPv6.
const revokedKeyLen = 44

// element appends a message about one element.
func (r *Revoked) element(seq uint32, typ uint16, k *cone.Key) {
	e := &r.enc
	list, element := r.openElement(RevokedSet, seq, typ, 0)
	key := e.Nest(unix.NFTA_SET_ELEM_KEY)
	e.Attr(unix.NFTA_DATA_VALUE, revokedKeyLen)
	e.B = append(append(e.B, k.Peer[:]...), k.Ext.Addr[:]...)
	for _, x := range []uint16{k.Ext.Port, k.Zone, uint16(k.HostBits)} {
		e.B = binary.BigEndian.AppendUint16(e.B, x)
		e.Pad()
	}
	e.EndNest(key)
	r.closeElement(list, element, typ, deniedTimeout)
}
