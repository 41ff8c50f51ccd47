package expect

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// repair retries p once after the kernel refused it. First it removes what is in the way:
// what a daemon that died left, or an entry that an inside host made by sending from port
// 0. Then the kernel has either all of p or nothing.
func (b *Backend) repair(p *cone.Permission, a anchor, errs answers) (cone.Reason, error) {
	retry := false
	for _, e := range errs {
		switch {
		case inTheWay(e):
			retry = true
		case errors.Is(e, unix.EAGAIN), errors.Is(e, unix.EOPNOTSUPP):
			// The helper is gone, or its module is not loaded yet.
			b.registerHelper()
			retry = true
		}
	}
	if retry {
		x, found, err := b.get(&p.Key)
		if err == nil && found && x.stands(p, a) && !b.renew(p, a).failed() {
			return cone.ReasonNone, nil
		}
		if err == nil && errs.helped(p) && !(found && x.ours()) {
			_ = b.withdraw(p, a)
			return cone.ReasonHelper, errs.cause()
		}
		if err == nil {
			if found && !x.helped() { // Linux 5.10 gives no error if the helper is gone
				b.registerHelper()
			}
			err = b.clear(p, a)
		}
		if err != nil {
			_ = b.withdraw(p, a)
			return cone.ReasonKernel, err
		}
		if errs = b.create(p, a); !errs.failed() {
			return cone.ReasonNone, nil
		}
	}
	_ = b.withdraw(p, a)
	return errs.reason(p), errs.cause()
}

// inTheWay reports whether err says that another entry is in the way.
func inTheWay(err error) bool {
	return errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EALREADY)
}

// helped reports whether the expectation of p met a foreign one. Permissions for groups do
// not count: ours may overlap. The foreign one is a helper's, which wants to make such a
// one again and drops the user's packets if it cannot. So p is not tried again until it is
// used up.
func (a answers) helped(p *cone.Permission) bool {
	return a[0] == nil && inTheWay(a[1]) && p.HostBits == 0
}

// registerHelper registers our own helper again, if it is in use.
func (b *Backend) registerHelper() {
	_, timeout := b.timeouts()
	b.helpers.register(b.c, timeout)
}

// cause returns the first error: later ones are consequences.
func (a answers) cause() error {
	for i, verb := range [...]string{"create anchor", "create expectation", "set timeout of expectation"} {
		if a[i] != nil {
			return fmt.Errorf("%s: %w", verb, a[i])
		}
	}
	return nil
}

func (a answers) reason(p *cone.Permission) cone.Reason {
	switch err := a.cause(); {
	case a.helped(p):
		return cone.ReasonHelper
	case errors.Is(err, unix.EMFILE), errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENFILE):
		return cone.ReasonTableFull
	case inTheWay(err):
		return cone.ReasonTaken
	}
	return cone.ReasonKernel
}

// create makes p stand on a.
func (b *Backend) create(p *cone.Permission, a anchor) answers {
	anchorTime, expectTime := b.timeouts()
	h := b.helpers.of(p)
	errs := b.exchange(func(seq uint32) {
		b.enc.newAnchor(seq, p, a, h.name, anchorTime)
		b.enc.newExpect(seq+1, p, a)
	})
	if !errs.failed() && !h.suits(expectTime) {
		errs[2] = b.exchange(func(seq uint32) { b.enc.renewExpect(seq, p, a, expectTime) })[0]
	}
	return errs
}

// renew does for p alone what Renew does.
func (b *Backend) renew(p *cone.Permission, a anchor) answers {
	anchorTime, expectTime := b.timeouts()
	return b.exchange(func(seq uint32) {
		b.enc.renewAnchor(seq, p, a, b.helpers.of(p).name, anchorTime)
		b.enc.renewExpect(seq+1, p, a, expectTime)
	})
}

// withdraw removes p and its anchor from the kernel, as clear does, so that p no longer
// stands. If the kernel fails, p still counts as standing, and the next operation tries again.
func (b *Backend) withdraw(p *cone.Permission, a anchor) error {
	err := b.clear(p, a)
	if err == nil {
		b.standing.release(a)
	} else {
		b.standing.unwanted[a] = *p
	}
	return err
}

// retry removes what the kernel failed to remove before, until the kernel fails again.
func (b *Backend) retry() {
	for a, p := range b.standing.unwanted {
		x, found, err := b.get(&p.Key)
		if err == nil {
			err = b.exchange(func(seq uint32) {
				if found && x.ours() && x.anchor() == a { // else it is another permission's by now
					b.enc.deleteExpect(seq, &p.Key)
				}
				b.enc.deleteAnchor(seq+1, a)
			}).deleted()
		}
		if err != nil {
			return
		}
		b.standing.release(a)
	}
}

// clear removes the anchor a from the kernel, and the expectation with the Key of p if it
// is ours, with its anchor if that is not a. They may be gone already. The expectation goes
// first, so that the kernel does not race the two.
func (b *Backend) clear(p *cone.Permission, a anchor) error {
	x, found, err := b.get(&p.Key)
	if err != nil {
		return err
	}
	old, stale := x.anchor(), false
	err = b.exchange(func(seq uint32) {
		if found && x.ours() {
			b.enc.deleteExpect(seq, &p.Key)
			if stale = old != a; stale {
				b.enc.deleteAnchor(seq+1, old)
			}
		}
		b.enc.deleteAnchor(seq+2, a)
	}).deleted()
	if stale && err == nil {
		b.standing.release(old)
	}
	return err
}

// get returns the kernel's expectation for k, whoever made it.
func (b *Backend) get(k *cone.Key) (x expectation, found bool, err error) {
	return get(b.c, &b.enc, k)
}

func get(c *nfnl.Conn, e *encoder, k *cone.Key) (x expectation, found bool, err error) {
	e.Reset()
	e.getExpect(c.NextSeq(1), k)
	err = c.Ask(&e.Encoder, func(typ uint16, body []byte) {
		if typ == subsysExpect<<8|msgNew {
			x, found = parseExpectation(body)
		}
	})
	switch {
	case errors.Is(err, unix.ENOENT):
		return expectation{}, false, nil
	case err != nil:
		return x, false, fmt.Errorf("look up expectation: %w", err)
	}
	x.zone = k.Zone // the kernel does not report it
	return x, found, nil
}

// exchange sends up to three messages in a send of their own and returns the answers.
func (b *Backend) exchange(encode func(seq uint32)) (errs answers) {
	b.enc.Reset()
	first := b.c.NextSeq(len(errs))
	encode(first)
	if err := b.c.Exchange(&b.enc.Encoder, func(seq uint32, err error) { errs[seq-first] = err }, nil); err != nil {
		errs[0] = err
	}
	return errs
}
