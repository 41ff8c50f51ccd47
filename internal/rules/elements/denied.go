package elements

import (
	"errors"
	"fmt"
	"maps"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A denial keeps the kernel from learning a permission.
type denial struct {
	until   time.Time
	revoked bool // the user took it away
}

// revokedNote is the comment at an element of the set of denials that the user asked
// for, as nft shows it. The next daemon tells these from others by it.
const revokedNote = "revoked"

// Deny ends ps, and keeps the kernel from learning them again until one is
// granted, or two hours are over, as long as there is room. What is but one too many
// gets half of it: a host that scans must not use up the room of what is forbidden.
// What the user revoked is told by Revoked to the next daemon.
func (m *Map) Deny(ps []cone.Permission, why cone.Reason) error {
	room := DeniedSize
	if why.TooMany() {
		room /= 2
	}
	revoked, full := why == cone.ReasonRevoked, false
	var errs []error
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		if revoked {
			errs = append(errs, m.lift(m.unmarked(part))) // an element that is there keeps its comment
		}
		if m.hasRoom(room, part) { // the kernel waits for all CPUs where there is none
			m.transact(part, func(seq uint32, p *cone.Permission) {
				m.denial(seq, unix.NFT_MSG_NEWSETELEM, p, revoked || m.denied[p.Key].revoked)
			})
			for i := range part {
				k := part[i].Key
				switch err := m.errs[i]; {
				case err == nil:
					m.denied[k] = denial{time.Now().Add(deniedTimeout), revoked || m.denied[k].revoked}
				case !m.gone(err):
					errs = append(errs, fmt.Errorf("deny %v -> %v: %w", part[i].Peer, part[i].Ext, nfnl.Permitted(err)))
				}
			}
		} else {
			full = true
		}
		errs = append(errs, m.Revoke(m.learned(part))) // last: a packet may have taught it meanwhile
	}
	if full {
		errs = append(errs, ErrNoRoom)
	}
	return errors.Join(errs...)
}

// HasRevoked reports whether something is denied that the user revoked.
func (m *Map) HasRevoked() bool {
	now := time.Now()
	for _, d := range m.denied {
		if d.revoked && now.Before(d.until) {
			return true
		}
	}
	return false
}

// unmarked returns those of ps that are denied for another reason than a revoke.
func (m *Map) unmarked(ps []cone.Permission) (others []cone.Permission) {
	for i := range ps {
		if d, is := m.denied[ps[i].Key]; is && !d.revoked {
			others = append(others, ps[i])
		}
	}
	return others
}

// Revoked takes over what an earlier daemon denied, and returns what the user had
// revoked. It has a connection of its own.
func (m *Map) Revoked() (keys []cone.Key, err error) {
	now := time.Now()
	err = m.w.listAttributes(DeniedSet, func(b []byte) {
		key, _, left := elementParts(b)
		if len(key) != keyLen {
			return
		}
		k := cone.Key{Peer: cone.AddrFrom4([4]byte(key)), Ext: endpoint(key[4:])}
		k.Wild = m.wild(k.Peer)
		d := denial{now.Add(left), noteOf(b) == revokedNote}
		m.denied[k] = d
		if d.revoked {
			keys = append(keys, k)
		}
	})
	return keys, err
}

// hasRoom reports whether ps can be denied.
func (m *Map) hasRoom(room int, ps []cone.Permission) bool {
	now, more := time.Now(), 0
	for i := range ps {
		if _, is := m.denied[ps[i].Key]; !is {
			more++
		}
	}
	if len(m.denied)+more > room && now.Sub(m.swept) > time.Minute {
		m.swept = now
		maps.DeleteFunc(m.denied, func(_ cone.Key, d denial) bool { return now.After(d.until) })
	}
	return len(m.denied)+more <= room
}

// learned returns those of ps, at most batch, that stand. The kernel waits for all CPUs
// where it is asked to delete what is not there.
func (m *Map) learned(ps []cone.Permission) (there []cone.Permission) {
	m.w.Lock()
	defer m.w.Unlock()
	stands, err := m.look(ps)
	if err != nil {
		return ps // nobody knows
	}
	for i := range ps {
		if _, ok := stands[elementKey(&ps[i])]; ok {
			there = append(there, ps[i])
		}
	}
	return there
}

// lift lifts the denials of ps. One may have ended by itself. One that the kernel does not
// lift is known still, for the next time.
func (m *Map) lift(ps []cone.Permission) error {
	var errs []error
	for i := range ps {
		if _, denied := m.denied[ps[i].Key]; !denied {
			continue
		}
		m.transact(ps[i:i+1], func(seq uint32, p *cone.Permission) {
			m.denial(seq, unix.NFT_MSG_DELSETELEM, p, false)
		})
		if err := m.errs[0]; err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("lift denial of %v -> %v: %w", ps[i].Peer, ps[i].Ext, nfnl.Permitted(err)))
			continue
		}
		delete(m.denied, ps[i].Key)
	}
	return errors.Join(errs...)
}

// denial appends a message about one element of the set of denials.
func (m *Map) denial(seq uint32, typ uint16, p *cone.Permission, revoked bool) {
	e := &m.enc
	list, element := m.openElement(DeniedSet, seq, typ, 0)
	m.key(&p.Key)
	if typ == unix.NFT_MSG_NEWSETELEM {
		e.BE64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(deniedTimeout.Milliseconds()))
		if revoked {
			// As libnftnl lays it out (nftnl_udata_put_strz).
			note := revokedNote + "\x00"
			e.Attr(unix.NFTA_SET_ELEM_USERDATA, 2+len(note))
			e.B = append(e.B, udataComment, byte(len(note)))
			e.B = append(e.B, note...)
			e.Pad()
		}
	}
	e.EndNest(element)
	e.EndNest(list)
	e.End()
}

const udataComment = 0 // NFTNL_UDATA_SET_ELEM_COMMENT

// noteOf returns the comment among the attributes of an element.
func noteOf(b []byte) (text string) {
	nfnl.Attributes(b, func(typ uint16, b []byte) {
		if typ != unix.NFTA_SET_ELEM_USERDATA {
			return
		}
		for len(b) >= 2 && len(b)-2 >= int(b[1]) {
			if n := int(b[1]); b[0] == udataComment && n > 0 {
				text = string(b[2 : 2+n-1]) // without NUL
			}
			b = b[2+int(b[1]):]
		}
	})
	return text
}
