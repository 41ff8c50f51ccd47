package engine

import (
	"errors"
	"fmt"
	"hash/maphash"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

const (
	// piece is how many claims or missing permissions the loop handles at once.
	piece = 1024

	// ListedAtMost is the largest map that Repair lists. For each message of a list the
	// kernel walks the set from its beginning: to list 200,000 elements takes 5 s, to ask
	// for each of them 0.6 s.
	ListedAtMost = 1 << 15

	// askedAtMost is about how many elements each Repair asks for of a map that is larger than
	// that and that only the daemon can change: of one part of such a map.
	askedAtMost = 1 << 14

	// learnedTime is the longest time until the model knows a permission that the kernel
	// learned.
	learnedTime = 2 * time.Second
)

// ErrEnded says that the loop ended before a comparison did.
var ErrEnded = errors.New("the daemon is stopping")

// A Difference says where the permissions in the kernel differ from those that should stand.
type Difference struct {
	// Missing should stand by these carriers, and do not.
	Missing []Placed
	// Unexpected stand by one carrier, and should not.
	Unexpected []Placed
	// Foreign are expectations of somebody else. They are no difference.
	Foreign []cone.Foreign

	Expectations, Elements int // how many were listed
}

// Placed is a permission, and what carries it or should carry it.
type Placed struct {
	cone.Permission
	By   cone.Carriers
	Left time.Duration // until the kernel ends it; of Unexpected only
}

// A Comparer compares the permissions in the kernel with those that should stand. Lists take
// long, so it makes them outside of the loop, and uses the Engine in short pieces.
type Comparer struct {
	// InLoop runs f in the loop and carries out what the model decides. It returns false if
	// the loop ended.
	InLoop func(f func(*Engine)) bool
	// Between is called between pieces of a long comparison.
	Between func()

	part uint64 // of an owned map: the part that was compared last
}

// Repair lets exactly the permissions stand that should: it grants missing ones again and
// revokes unexpected ones. It looks for unexpected ones in a large map only if somebody
// may have changed it (mapTouched), and grants missing ones first. If only the daemon can change the map
// (owned), each call checks one part of a large one. While permissions of an earlier daemon are
// adopted, any map counts as large, and nothing in it is unexpected.
func (c *Comparer) Repair(mapTouched, owned bool) error {
	standing, adopting := 0, false
	if !c.InLoop(func(e *Engine) { standing, adopting = e.Model.Stats().Standing, e.Model.Adopting() }) {
		return nil
	}
	if adopting { // what is unexpected has to be adopted
		mapTouched = false
	}
	large := adopting || standing > ListedAtMost
	s := scope{list: !large}
	if large && !mapTouched && owned {
		parts := partsOf(standing)
		c.part = (c.part + 1) % parts
		s.asked = func(k cone.Key) bool { return partOfKey(k, parts) == c.part }
	}
	err := c.repair(s)
	if large && mapTouched {
		err = errors.Join(err, c.repair(scope{list: true}))
	}
	return err
}

// partsOf returns the number of parts of an owned map with n elements.
func partsOf(n int) uint64 { return max(1, uint64(n+askedAtMost-1)/askedAtMost) }

// partOfKey returns which of the parts of an owned map k is in.
func partOfKey(k cone.Key, parts uint64) uint64 { return maphash.Comparable(partSeed, k) % parts }

var partSeed = maphash.MakeSeed()

func (c *Comparer) repair(s scope) error {
	var retry []cone.Permission // they lack an expectation that may be possible now
	d, err := c.look(s, func(e *Engine, v *cone.View) {
		if x := e.Kernel.Expectations; v.Why != cone.ReasonNone && x != nil && x.HasRoom(&v.Permission) {
			retry = append(retry, v.Permission)
		}
	})
	if errors.Is(err, ErrEnded) {
		return nil
	}
	if err != nil {
		return err
	}
	c.InLoop(func(e *Engine) {
		for _, x := range d.Foreign {
			e.Model.SeeForeign(e.cfg.Now(), x)
		}
	})
	// Before the unexpected ones end: another carrier of the same permission may be missing.
	err = c.confirm(d.Missing, func(e *Engine, p *Placed) { e.restore(p.Permission, p.By) })
	c.InLoop(func(e *Engine) {
		for i := range retry {
			e.Model.Retry(e.cfg.Now(), retry[i])
		}
		now := e.cfg.Now()
		unseen := now - e.Model.Known(now)
		for i := range d.Unexpected {
			if p := &d.Unexpected[i]; !p.isYoung(e.Model.Lifetime(), unseen) {
				e.Model.Unexpected(now, p.Permission, p.By)
			}
		}
	})
	return err
}

// isYoung reports whether p, an unexpected element, may just have been learned, so that the
// model does not know it yet: of the time unseen the model does not know all flows. An element
// with more than a lifetime left was not learned: somebody added it.
func (p *Placed) isYoung(lifetime, unseen time.Duration) bool {
	age := lifetime - p.Left
	return p.By == cone.ByMap && age <= learnedTime+unseen && age >= -time.Second
}

// Verify finds what differs and changes nothing. It calls each, in the loop, for each
// standing permission.
func (c *Comparer) Verify(each func(v *cone.View)) (Difference, error) {
	d, err := c.look(scope{list: true}, func(_ *Engine, v *cone.View) { each(v) })
	if err != nil {
		return d, err
	}
	suspects := d.Missing
	d.Missing = nil
	err = c.confirm(suspects, func(_ *Engine, p *Placed) { d.Missing = append(d.Missing, *p) })
	return d, err
}

// A scope says how the map is compared. Expectations are always listed.
type scope struct {
	list  bool                // list the map; otherwise ask it for single elements
	asked func(cone.Key) bool // which elements to ask for, if it is not listed; nil: all
}

// A list is what stands by one carrier, nil if that was not listed.
type list map[cone.Key]standing

type standing struct {
	in     cone.Endpoint
	mapped bool // MapTranslates, of an expectation
	left   time.Duration
}

func (l list) add(p cone.Permission, left time.Duration) {
	l[p.Key] = standing{p.Int, p.MapTranslates, left}
}

func (l list) has(p *cone.Permission) bool {
	s, ok := l[p.Key]
	return ok && s.in == p.Int
}

// expects is has, of a list of expectations.
func (l list) expects(p *cone.Permission) bool {
	s, ok := l[p.Key]
	return ok && s.mapped == p.MapTranslates && (s.mapped || s.in == p.Int)
}

// look lists what stands and compares it with what should. Its Missing are suspects: see
// confirm. It calls each, in the loop, for each permission that should stand.
func (c *Comparer) look(s scope, each func(*Engine, *cone.View)) (d Difference, err error) {
	var k Kernel
	var began time.Duration
	if !c.InLoop(func(e *Engine) { k, began = e.Kernel, e.cfg.Now() }) {
		return d, ErrEnded
	}
	var expected, mapped list
	if k.Expectations != nil {
		expected, d.Foreign, err = listExpectations(k.Expectations)
	}
	if k.Map != nil && s.list {
		mapped = make(list)
		err = errors.Join(err, k.Map.List(mapped.add))
	}
	if err != nil {
		return d, fmt.Errorf("list permissions: %w", err)
	}
	d.Expectations, d.Elements = len(expected), len(mapped)
	ok := c.walk(func(e *Engine, v *cone.View) {
		// A permission granted after the lists were requested need not be in them.
		if by := s.lacking(v, expected, mapped); by != 0 && v.Since < began {
			d.Missing = append(d.Missing, Placed{Permission: v.Permission, By: by})
		}
		each(e, v)
		if v.By&cone.ByExpectation != 0 {
			delete(expected, v.Key)
		}
		if v.By&cone.ByMap != 0 {
			delete(mapped, v.Key)
		}
	})
	if !ok {
		return d, ErrEnded
	}
	d.unexpected(expected, cone.ByExpectation)
	d.unexpected(mapped, cone.ByMap)
	return d, nil
}

func listExpectations(x Expectations) (l list, others []cone.Foreign, err error) {
	l = make(list)
	err = x.ListAll(l.add, func(f cone.Foreign) { others = append(others, f) })
	return l, others, err
}

// lacking returns the carriers that should hold v and whose lists lack it. Without a list of
// expectations none is missing. Without one of the map, each element that asked selects is a
// suspect.
func (s scope) lacking(v *cone.View, expected, mapped list) (by cone.Carriers) {
	if v.By&cone.ByExpectation != 0 && expected != nil && !expected.expects(&v.Permission) {
		by |= cone.ByExpectation
	}
	if v.By&cone.ByMap != 0 && !mapped.has(&v.Permission) && (s.asked == nil || s.asked(v.Key)) {
		by |= cone.ByMap
	}
	return by
}

func (d *Difference) unexpected(l list, by cone.Carriers) {
	for k, s := range l {
		d.Unexpected = append(d.Unexpected, Placed{cone.Permission{Key: k, Int: s.in}, by, s.left})
	}
}

// confirm calls f, in the loop, for each of the suspects that the kernel really lacks, once
// for each carrier that lacks it. A list can miss permissions that are being renewed, or
// some while others end; so expectations are listed again, and the map is asked for each
// element.
func (c *Comparer) confirm(suspects []Placed, f func(*Engine, *Placed)) error {
	var again list
	if slices.ContainsFunc(suspects, func(p Placed) bool { return p.By&cone.ByExpectation != 0 }) {
		var k Kernel
		c.InLoop(func(e *Engine) { k = e.Kernel })
		if k.Expectations != nil {
			var err error
			if again, _, err = listExpectations(k.Expectations); err != nil {
				return fmt.Errorf("list permissions: %w", err)
			}
		}
	}
	for some := range slices.Chunk(suspects, piece) {
		var err error
		if c.InLoop(func(e *Engine) { err = e.confirm(some, again, f) }); err != nil {
			return err
		}
		c.Between()
	}
	return nil
}

func (e *Engine) confirm(suspects []Placed, expected list, f func(*Engine, *Placed)) error {
	var inMap []cone.Permission
	for i := range suspects {
		p := &suspects[i]
		if p.By&cone.ByExpectation != 0 && expected != nil && !expected.expects(&p.Permission) {
			f(e, &Placed{Permission: p.Permission, By: cone.ByExpectation})
		}
		if p.By&cone.ByMap != 0 {
			inMap = append(inMap, p.Permission)
		}
	}
	if e.Kernel.Map == nil || len(inMap) == 0 {
		return nil
	}
	return e.Kernel.Map.Missing(inMap, func(i int) { f(e, &Placed{Permission: inMap[i], By: cone.ByMap}) })
}

// walk calls f, in the loop, for each permission that should stand, a piece at a time.
func (c *Comparer) walk(f func(*Engine, *cone.View)) bool {
	for at := 0; at >= 0; {
		ok := c.InLoop(func(e *Engine) {
			at = e.Model.Walk(at, piece, func(v cone.View) {
				if v.State == cone.StateStanding {
					f(e, &v)
				}
			})
		})
		if !ok {
			return false
		}
		c.Between()
	}
	return true
}
