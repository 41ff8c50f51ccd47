package daemon

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/evidence"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

const (
	// With events = "auto" the kernel hides flows while it learns at least leanAbove
	// permissions a second, and until it has learned fewer than leanBelow for leanFor.
	leanAbove, leanBelow = 2000, 1000
	leanFor              = 10 * time.Second
	// leanRenew is how often the daemon tells the kernel to go on.
	leanRenew = elements.LeanTimeout / 3
	// leanLifetime is the least lifetime with which the kernel hides flows: the daemon must find
	// them well before their permissions end. It looks leanLooks times in a lifetime.
	leanLifetime = 30 * time.Second
	leanLooks    = 3
	// listAge is how old a list may be while the kernel hides flows.
	listAge = 5 * time.Second
)

// lean says whether the kernel reports the flows whose permission it learned (events, ADR
// 10), and those that can have none. The reconcile owns it.
type lean struct {
	hidden
	quiet hidden
	pace  pace
	// answers says that a flow may begin of which the model must hear at once (AwaitsAnswers).
	answers bool
}

// hidden says whether the kernel reports some flows.
type hidden struct {
	on   bool
	told time.Duration // when the kernel was last told to hide them
}

// due reports whether the kernel must be told (again) to hide them.
func (h hidden) due(now time.Duration) bool { return !h.on || now-h.told >= leanRenew }

// over reports whether the kernel reports them again, told or not.
func (h hidden) over(now time.Duration) bool { return now-h.told > elements.LeanTimeout }

// A pace tells whether the kernel learns many permissions.
type pace struct {
	many    bool
	learned evidence.Count
	total   uint64        // at the last look
	looked  time.Duration // 0 before the first look
	low     time.Duration // since when the kernel has learned few
}

// look takes the kernel's count of permissions that it learned.
func (p *pace) look(now time.Duration, count uint64) {
	total := p.learned.Read(count)
	n, past := total-p.total, now-p.looked
	first := p.looked == 0
	p.total, p.looked = total, now
	if first {
		return
	}
	rate := float64(n) / past.Seconds()
	if rate >= leanBelow {
		p.low = now
	}
	p.many = rate >= leanAbove || p.many && now-p.low < leanFor
}

// mayHide reports whether no promise needs a report of each flow whose permission the kernel
// learned: the map alone carries these permissions, early packets make no flows, the zones of
// flows do not matter, reconciles find the flows in time, no forward waits for the end of one, and
// nobody watches.
func (r *reconciler) mayHide(cfg config.Config) bool {
	f := r.firewall
	return cfg.Events != config.AllEvents && cfg.Lifetime >= leanLifetime && f.learns(cfg) && f.labels() &&
		!f.expects(cfg) && r.guarded(cfg) && len(f.zonedAddrs()) == 0 && !r.watchers.Any() && !r.lean.answers
}

// expects reports whether expectations carry, or may carry, permissions that the kernel
// learns.
func (f *firewall) expects(cfg config.Config) bool {
	return f.withExpectations() && slices.ContainsFunc(cfg.Subnets, func(s config.Subnet) bool {
		return s.Prefix.Addr().Is4() && !s.Routed && f.decisions[s.Prefix].Choice != cone.ChooseMap
	})
}

// guarded reports whether packets that come too early make no flows. The guard does not know
// links in a VRF.
func (r *reconciler) guarded(cfg config.Config) bool {
	return cfg.Guard && r.firewall.has(rules.FeatureGuard) && !r.hasVRF()
}

func (r *reconciler) hasVRF() bool {
	return slices.ContainsFunc(r.network.Links, func(l gateway.Link) bool { return l.Kind == "vrf" })
}

// lookForListeners is lookAtListeners, and notes its error.
func (r *reconciler) lookForListeners(ctx context.Context) {
	if err := r.lookAtListeners(); ctx.Err() == nil {
		r.failures.Note(requestLookAtListeners, 1, err)
	}
}

// lookAtListeners lets the kernel hide flows whose permission it learned, and those that can
// have none, or report all. It hides none while another program listens to conntrack.
func (r *reconciler) lookAtListeners() error {
	var cfg config.Config
	var unseen time.Duration
	var many bool
	if !r.ask(func(l *loop) {
		cfg, unseen = l.cfg, l.unseen()
		many, r.lean.answers = l.engine.Model.ManyEnded(), l.engine.Model.AwaitsAnswers(l.now())
	}) {
		return errEnded
	}
	if many || unseen >= cfg.Lifetime/leanLooks {
		r.wantReconcile()
	}
	wanted, err := r.wantsLean(cfg)
	wanted = wanted && unseen < cfg.Lifetime/2 // else the table was not read in time
	quiet := wanted || cfg.Quiet && r.firewall.has(rules.FeatureQuiet)
	if quiet {
		others, unread := r.events.OtherListeners()
		err = errors.Join(err, unread)
		quiet = unread == nil && others == 0
	}
	wanted = wanted && quiet
	err = errors.Join(err, r.beQuiet(quiet))
	switch {
	case wanted && r.lean.due(r.now()):
		err = errors.Join(err, r.hideLearned())
	case !wanted && r.lean.on:
		r.wantReconcile()
		err = errors.Join(err, r.hideNothing())
	}
	return err
}

// beQuiet lets the kernel hide flows that can have no permission, or report them. No dump needs
// these reports.
func (r *reconciler) beQuiet(quiet bool) error {
	q, now := &r.lean.quiet, r.now()
	if quiet == q.on && (!quiet || !q.due(now)) {
		return nil
	}
	s := r.firewall.tables.NewQuiet()
	if quiet {
		q.told = now
		if err := s.On(); err != nil {
			return err
		}
	} else if err := s.Off(); err != nil && !q.over(now) {
		return err
	}
	q.on = quiet
	r.ask(func(l *loop) { l.quiet = quiet })
	return nil
}

// wantsLean reports whether the kernel should hide flows, if nobody else listens.
func (r *reconciler) wantsLean(cfg config.Config) (bool, error) {
	if !r.mayHide(cfg) {
		return false, nil
	}
	if cfg.Events == config.LeanEvents {
		return true, nil
	}
	p := &r.lean.pace
	if now := r.now(); p.looked == 0 || now-p.looked >= time.Second {
		n, err := r.firewall.tables.Learned()
		if err != nil {
			return false, err
		}
		p.look(now, n)
	}
	return p.many, nil
}

func (r *reconciler) hideLearned() error {
	if !r.ask(func(l *loop) { l.engine.Model.SetLean(true) }) { // before any flow is hidden
		return errEnded
	}
	r.lean.on, r.lean.told = true, r.now()
	return r.firewall.tables.NewLean().On()
}

// hideNothing lets the kernel report all flows again. It is also called before each dump: only
// with a dump made while flows are reported does the model know them all, and only then may
// permissions end. The next look hides flows again.
func (r *reconciler) hideNothing() error {
	if !r.lean.on {
		return nil
	}
	if err := r.firewall.tables.NewLean().Off(); err != nil && !r.lean.over(r.now()) {
		return err // until it is over by itself
	}
	r.lean.on = false
	r.ask(func(l *loop) { l.engine.Model.SetLean(false) })
	return nil
}

// seeEnded shows the model flows that it learned of when they ended, but for those whose
// source may be spoofed.
func (r *reconciler) seeEnded() error {
	var ended []cone.Flow
	r.ask(func(l *loop) { ended = l.engine.Model.TakeEnded() })
	for piece := range slices.Chunk(ended, flowsAtOnce) {
		piece, err := r.firewall.sure(piece)
		if err != nil {
			return fmt.Errorf("find out which flows may be spoofed: %w", err)
		}
		r.ask(func(l *loop) {
			now := r.now()
			for i := range piece {
				l.engine.Model.SeeEnded(now, &piece[i])
			}
		})
	}
	return nil
}

// unseen returns how long ago a flow may have begun that the model does not know.
func (l *loop) unseen() time.Duration {
	now := l.now()
	return now - l.engine.Model.Known(now)
}

// showAll lets the model know all flows that began up to age ago, if the kernel hides some.
func (s *shared) showAll(age time.Duration) error {
	known := false
	if !s.do(func(l *loop) { known = l.unseen() <= age }) || known {
		return nil
	}
	return s.job(func(r *reconciler) error {
		if err := r.readFlows(r.reads); err != nil {
			return fmt.Errorf("read flows: %w", err)
		}
		return nil
	})
}
