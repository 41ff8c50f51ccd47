package elements

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A Mapping is the outside endpoint of an inside endpoint on an outside link.
type Mapping struct {
	Link     string
	Int, Ext cone.Endpoint
}

// Taken is an outside port that a flow without a mapping uses towards a remote endpoint.
type Taken struct {
	Remote cone.Endpoint
	Port   uint16
}

// ErrOtherMapping says that a mapping conflicts with an existing one.
var ErrOtherMapping = errors.New("another mapping stands")

// Mappings are those that the kernel learned. Their sets exist once rules.Tables.Set made
// them. Mappings may be used concurrently with the tables, but its own methods must not be
// called concurrently, except for List.
type Mappings struct {
	batcher
	lifetime   time.Duration
	links      map[string]*LinkSets
	owners     bool
	keptFor    time.Duration
	key, value [64]byte // of the element that is being encoded
}

// A MappingsConfig says how the tables of Mappings were made.
type MappingsConfig struct {
	Links  []string // the links that have sets
	Owners bool     // OwnersMap and OwnerPortsMap exist
	// Lifetime and KeptFor are those of rules.MappingConfig.
	Lifetime, KeptFor time.Duration
}

// NewMappings returns the Mappings of the tables of w.
func NewMappings(w *Writer, c MappingsConfig) *Mappings {
	m := &Mappings{
		lifetime: c.Lifetime, keptFor: max(keptTimeout, c.KeptFor),
		links: map[string]*LinkSets{}, owners: c.Owners,
	}
	for _, link := range c.Links {
		m.links[link] = SetsOfLink(link)
	}
	m.begin(w)
	return m
}

// SetLifetime sets the timeout of mappings that are added or kept from now on.
func (m *Mappings) SetLifetime(d time.Duration) { m.lifetime = d }

// Keep extends ms by another lifetime, and adds those that no longer exist. It calls
// refused as Add does.
//
// Before Linux 6.12, adding an element again does not renew its timeout, so it is deleted
// and added in one transaction. Before 6.17 a packet may find neither.
func (m *Mappings) Keep(ms []Mapping, refused func(i int, err error)) {
	m.put(ms, m.renew, refused)
}

// Add adds ms, and calls refused with the index of each that it could not add. The error is
// ErrOtherMapping if the inside endpoint has a mapping already, or the outside endpoint an
// owner. The caller must pass living flows of a refused mapping to Take.
func (m *Mappings) Add(ms []Mapping, refused func(i int, err error)) {
	m.put(ms, m.add, refused)
}

// put sends what encode makes of ms. It adds refused mappings again, one by one: the conflict may
// have been with a mapping of the same batch that was refused itself.
func (m *Mappings) put(ms []Mapping, encode func(seq uint32, p *Mapping), refused func(i int, err error)) {
	inBatches(&m.batcher, ms, perMapping, encode, func(i int, err error) {
		if conflicts(err) || errors.Is(err, unix.ENOENT) && m.links[ms[i].Link] != nil {
			err = m.alone(ms[i : i+1])
		}
		switch {
		case err == nil:
		case conflicts(err):
			refused(i, ErrOtherMapping)
		default:
			refused(i, fmt.Errorf("add element: %w", nfnl.Permitted(err)))
		}
	})
}

// A Move is a mapping that another link takes over.
type Move struct {
	Mapping
	To string
}

// Move makes links take over mappings from others: the next flow by such a link has the same outside
// endpoint. A mapping that has ended, or whose inside endpoint has one on the new link, stays as it is.
func (m *Mappings) Move(ms []Move) error {
	var errs []error
	var moved []Mapping
	inBatches(&m.batcher, ms, perMapping+perSource, m.move, func(i int, err error) {
		switch {
		case err == nil:
			moved = append(moved, ms[i].moved())
		case !conflicts(err) && !errors.Is(err, unix.ENOENT):
			errs = append(errs, fmt.Errorf("move mapping %v to %s: %w", ms[i].Int, ms[i].To, nfnl.Permitted(err)))
		}
	})
	return errors.Join(append(errs, m.Teach(moved))...)
}

func (x *Move) moved() Mapping { return Mapping{Link: x.To, Int: x.Int, Ext: x.Ext} }

func conflicts(err error) bool { return errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EEXIST) }

// alone adds one mapping in a transaction of its own, and keeps the errors of the batch.
func (m *Mappings) alone(one []Mapping) error {
	errs := m.errs
	defer func() { m.errs = errs }()
	m.errs[0] = nil
	transact(&m.batcher, one, perMapping, m.add)
	return m.errs[0]
}

// Revoke ends ms. It is no error if some have ended already. The kernel deletes by key,
// whatever value the element has. Living flows keep their outside endpoints.
func (m *Mappings) Revoke(ms []Mapping) error {
	return errors.Join(m.Release(ms), m.disownAll(ms))
}

// disownAll deletes what says who has the outside endpoints of ms.
func (m *Mappings) disownAll(ms []Mapping) error {
	err := m.disown(ms, OwnedSet)
	if m.owners {
		err = errors.Join(err, m.disown(ms, OwnersMap), m.disown(ms, OwnerPortsMap))
	}
	return err
}

// RevokeLost is Revoke for mappings to addresses that their hosts no longer get. A packet of such a
// host may have made another mapping since these were listed (chain lost_address), which ends with
// them. Nobody would own its outside endpoint, and its host get another one: so all endpoints without a
// mapping get free.
func (m *Mappings) RevokeLost(ms []Mapping) error {
	if len(ms) == 0 {
		return nil
	}
	free := make(map[cone.Endpoint]struct{})
	owned := func(p Mapping, _ time.Duration) { delete(free, p.Ext) }
	err := errors.Join(
		m.Revoke(ms),
		m.w.list(OwnedSet, func(key, _ []byte, _ time.Duration) { free[endpoint(key)] = struct{}{} }),
		m.List(owned), m.List(owned), // last, since a packet gets both at once; twice, since a list may miss some
	)
	if err != nil {
		return err
	}
	var orphans []Mapping
	for e := range free {
		orphans = append(orphans, Mapping{Ext: e})
	}
	return m.disownAll(orphans)
}

func (m *Mappings) disown(ms []Mapping, set string) error {
	return m.remove(ms, func(p *Mapping) string { m.outside(p); return set })
}

// Release ends ms, but leaves their outside endpoints to other owners.
func (m *Mappings) Release(ms []Mapping) error {
	return errors.Join(
		m.remove(ms, func(p *Mapping) string {
			m.inside(p)
			if p.kept() {
				return m.setsOf(p).Kept
			}
			return m.setsOf(p).Moved
		}),
		m.remove(ms, func(p *Mapping) string {
			m.inside(p)
			if p.kept() {
				return ""
			}
			return m.setsOf(p).Ports
		}))
}

// remove deletes an element for each of ms. element writes its key and returns its set, or
// "" for none.
func (m *Mappings) remove(ms []Mapping, element func(p *Mapping) string) error {
	var errs []error
	inBatches(&m.batcher, ms, 1, func(seq uint32, p *Mapping) {
		if set := element(p); set != "" {
			m.element(seq, unix.NFT_MSG_DELSETELEM, false, set, endpointLen, 0, 0)
		}
	}, func(i int, err error) {
		if err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("delete mapping %v: %w", ms[i].Int, nfnl.Permitted(err)))
		}
	})
	return errors.Join(errs...)
}

// Take keeps mappings from being used towards the remote endpoints of flows without a
// mapping, for rules.MappingConfig.KeptFor.
func (m *Mappings) Take(flows []Taken) error {
	var refused int
	var first error
	inBatches(&m.batcher, flows, 3, m.take, func(_ int, err error) {
		if err != nil {
			refused++
			first = cmp.Or(first, err)
		}
	})
	if refused > 0 {
		return fmt.Errorf("add %d of %d elements: %w", refused, len(flows), nfnl.Permitted(first))
	}
	return nil
}

// List calls f for every mapping, with its remaining time. Mappings that are added or
// removed during the call may be missing. It uses its own connection.
func (m *Mappings) List(f func(p Mapping, left time.Duration)) error {
	var errs []error
	for _, l := range m.links {
		errs = append(errs, m.list(l, f))
	}
	return errors.Join(errs...)
}

func (m *Mappings) list(l *LinkSets, f func(p Mapping, left time.Duration)) error {
	ports := map[cone.Endpoint]uint16{}
	err := m.w.list(l.Ports, func(key, value []byte, _ time.Duration) {
		if len(key) == endpointLen && len(value) == portLen {
			ports[endpoint(key)] = binary.BigEndian.Uint16(value)
		}
	})
	address := func(port func(cone.Endpoint) (uint16, bool)) func(key, value []byte, left time.Duration) {
		return func(key, value []byte, left time.Duration) {
			if len(key) != endpointLen || len(value) != addressLen {
				return
			}
			in := endpoint(key)
			if port, ok := port(in); ok {
				f(Mapping{Link: l.Link, Int: in, Ext: cone.Endpoint{Addr: cone.AddrFrom4([4]byte(value)), Port: port}}, left)
			}
		}
	}
	return errors.Join(err,
		m.w.list(l.Kept, address(func(in cone.Endpoint) (uint16, bool) { return in.Port, true })),
		m.w.list(l.Moved, address(func(in cone.Endpoint) (uint16, bool) { port, ok := ports[in]; return port, ok })))
}
