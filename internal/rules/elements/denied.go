package elements

import (
	"errors"
	"fmt"
	"iter"
	"maps"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Deny ends ps, and keeps the kernel from learning them again until they are granted or two
// hours have passed, as long as there is room. If a limit was reached, the kernel learns nothing
// for the hosts of ps for a minute, or until one is granted to them: with many peers they would
// ask for each.
func (m *Map) Deny(ps []cone.Permission, why cone.Reason) error {
	full := false
	var errs []error
	for base := 0; base < len(ps); base += batch {
		part := ps[base:min(base+batch, len(ps))]
		switch {
		case why.TooMany():
			errs = append(errs, m.denyHosts(part))
		case m.hasRoom(part):
			m.transact(part, func(seq uint32, p *cone.Permission) { m.denial(seq, unix.NFT_MSG_NEWSETELEM, p) })
			for i := range part {
				switch err := m.errs[i]; {
				case err == nil:
					m.denied[part[i].Key] = time.Now().Add(deniedTimeout)
				case !m.gone(err):
					errs = append(errs, fmt.Errorf("deny %v -> %v: %w", part[i].Peer, part[i].Ext, nfnl.Permitted(err)))
				}
			}
		default:
			full = true
		}
		errs = append(errs, m.Revoke(part)) // last, because the kernel may have learned it meanwhile
	}
	if full {
		errs = append(errs, ErrNoRoom)
	}
	return errors.Join(errs...)
}

// denyHosts keeps the kernel from learning permissions of the hosts of ps, at most batch. If there
// is no room for more hosts, what the kernel learns for them ends one by one.
func (m *Map) denyHosts(ps []cone.Permission) error {
	now := time.Now()
	maps.DeleteFunc(m.full, func(_ cone.Addr, until time.Time) bool { return now.After(until) })
	m.hosts = m.hosts[:0]
	for i := range ps {
		host := ps[i].Int.Addr
		if _, known := m.full[host]; known || len(m.full) == FullSize {
			continue
		}
		m.full[host] = time.Time{} // until the kernel has it
		m.hosts = append(m.hosts, ps[i])
	}
	var errs []error
	m.transact(m.hosts, func(seq uint32, p *cone.Permission) { m.fullHost(seq, unix.NFT_MSG_NEWSETELEM, p) })
	for i := range m.hosts {
		host := m.hosts[i].Int.Addr
		delete(m.full, host)
		switch err := m.errs[i]; {
		case err == nil: // the kernel's own time began earlier
			m.full[host] = time.Now().Add(fullTimeout)
		case !m.gone(err):
			errs = append(errs, fmt.Errorf("learn nothing for %v: %w", host, nfnl.Permitted(err)))
		}
	}
	return errors.Join(errs...)
}

// learnAgain undoes denyHosts for the hosts of ps, at most batch: a host that is granted a
// permission has room. If the kernel refuses, it learns again when the element's time is over.
func (m *Map) learnAgain(ps []cone.Permission) {
	if len(m.full) == 0 {
		return
	}
	m.hosts = m.hosts[:0]
	for i := range ps {
		host := ps[i].Int.Addr
		if until, known := m.full[host]; known && time.Now().Before(until) {
			m.hosts = append(m.hosts, ps[i])
		}
		delete(m.full, host)
	}
	m.transact(m.hosts, func(seq uint32, p *cone.Permission) { m.fullHost(seq, unix.NFT_MSG_DELSETELEM, p) })
}

// fullHost appends a message about the host of p in FullSet.
func (m *Map) fullHost(seq uint32, typ uint16, p *cone.Permission) {
	list, element := m.openElement(FullSet, seq, typ, 0)
	m.data(unix.NFTA_SET_ELEM_KEY, p.Int.Addr[12:])
	m.closeElement(list, element, typ, fullTimeout)
}

// AdoptDenied takes over the denials of an earlier daemon, and the hosts for which the kernel learns
// nothing. It uses its own connection.
func (m *Map) AdoptDenied() error {
	now := time.Now()
	err := m.w.list(DeniedSet, func(key, _ []byte, left time.Duration) {
		if k, ok := keyOf(key); ok {
			k.HostBits = m.hostBits(k.Peer)
			m.denied[k] = now.Add(left)
		}
	})
	if err != nil {
		return err
	}
	return m.w.list(FullSet, func(key, _ []byte, left time.Duration) {
		if len(key) == addressLen {
			m.full[cone.AddrFrom4([4]byte(key))] = now.Add(left)
		}
	})
}

// hasRoom reports whether the set has room for denials of ps.
func (m *Map) hasRoom(ps []cone.Permission) bool {
	return hasRoom(m.denied, &m.swept, DeniedSize, func(yield func(cone.Key) bool) {
		for i := range ps {
			if !yield(ps[i].Key) {
				return
			}
		}
	})
}

// hasRoom reports whether a set of at most room elements has room for keys. known has its
// elements with their time of expiry; hasRoom removes expired ones at most once a minute.
// Adding to a full set aborts the transaction, and an abort waits for an RCU grace period.
func hasRoom(known map[cone.Key]time.Time, swept *time.Time, room int, keys iter.Seq[cone.Key]) bool {
	now, more := time.Now(), 0
	for k := range keys {
		if _, is := known[k]; !is {
			more++
		}
	}
	if len(known)+more > room && now.Sub(*swept) > time.Minute {
		*swept = now
		maps.DeleteFunc(known, func(_ cone.Key, until time.Time) bool { return now.After(until) })
	}
	return len(known)+more <= room
}

// lift lifts the denials of ps. A denial may have expired. A denial that the kernel refuses
// to delete stays known, so that the next call tries again.
func (m *Map) lift(ps []cone.Permission) error {
	var errs []error
	for i := range ps {
		if _, denied := m.denied[ps[i].Key]; !denied {
			continue
		}
		m.transact(ps[i:i+1], func(seq uint32, p *cone.Permission) {
			m.denial(seq, unix.NFT_MSG_DELSETELEM, p)
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
func (m *Map) denial(seq uint32, typ uint16, p *cone.Permission) {
	list, element := m.openElement(DeniedSet, seq, typ, 0)
	m.key(&p.Key)
	m.closeElement(list, element, typ, deniedTimeout)
}
