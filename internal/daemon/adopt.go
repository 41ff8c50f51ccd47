package daemon

import (
	"context"
	"errors"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// A map that an earlier daemon left is listed at the start. The time for that grows with the
// square of its size, so of a large map only a sample is. The rest is adopted while the daemon
// runs: what live flows hold, by asking for it, as the first dump shows the flows; then what no
// flow holds, from a list that nothing waits for.

// left lists the permissions in the map of an earlier daemon, if there is one. That
// daemon's peer groups may differ from those of cfg.
func (f *firewall) left(cfg config.Config) (all []expect.Adopted, err error) {
	m, err := f.leftMap(cfg)
	if m == nil || err != nil {
		return nil, err
	}
	err = m.List(func(p cone.Permission, left time.Duration) {
		all = append(all, expect.Adopted{Permission: p, By: cone.ByMap, Left: left})
	})
	return all, err
}

// leftMap returns the map of an earlier daemon, nil if there are no tables. It knows the groups
// of peers of both daemons.
func (f *firewall) leftMap(cfg config.Config) (*elements.Map, error) {
	if f.tables == nil {
		return nil, nil
	}
	groups, err := f.tables.PeerGroups()
	if err != nil {
		return nil, err
	}
	cfg.PeerGroups = append(groups, cfg.PeerGroups...)
	return f.tables.NewMap(mapConfig(cfg)), nil
}

// leftSome is left, but of a map with more than engine.ListedAtMost elements it returns about as
// many, and the map to adopt the others from.
func (f *firewall) leftSome(cfg config.Config, outside []string) (some []expect.Adopted, rest *elements.Map, err error) {
	m, err := f.leftMap(cfg)
	if m == nil || err != nil {
		return nil, nil, err
	}
	var sample []cone.Permission
	large := false
	err = m.Keys(func(k cone.Key) bool {
		large = len(sample) == engine.ListedAtMost
		if !large {
			sample = append(sample, cone.Permission{Key: k})
		}
		return !large
	})
	if err == nil && large {
		f.withMap = true
		f.observe(cfg, outside)
		large, err = f.tables.KeepsMap(f.desired(cfg, outside))
	}
	if err != nil || !large {
		some, err = f.left(cfg)
		return some, nil, err
	}
	err = m.Find(sample, func(p cone.Permission, left time.Duration) {
		some = append(some, expect.Adopted{Permission: p, By: cone.ByMap, Left: left})
	})
	return some, m, err
}

// adoptHeld adopts the permissions that flows of the first dump hold. It runs in the loop.
func (l *loop) adoptHeld(flows []cone.Flow) error {
	if !l.engine.Model.Adopting() {
		return nil
	}
	var held []cone.Permission
	for i := range flows {
		l.engine.Model.Unknown(&flows[i], func(p cone.Permission) {
			if l.rest.Carries(&p) {
				held = append(held, p)
			}
		})
	}
	return l.adoptElements(held)
}

// adoptElements adopts the permissions in the map that have the keys of ps.
func (l *loop) adoptElements(ps []cone.Permission) error {
	return l.rest.Find(ps, func(p cone.Permission, left time.Duration) {
		now := l.now()
		l.engine.Model.Adopt(now, p, cone.ByMap, now+left)
	})
}

// adoptRest adopts, once the flows are known, the permissions that no flow holds.
func (s *shared) adoptRest(ctx context.Context, rest *elements.Map) error {
	defer close(s.adopted)
	if rest == nil {
		return nil
	}
	select {
	case <-s.ready:
	case <-ctx.Done():
		return nil
	}
	const again = 5 * time.Second
	for {
		err := s.adoptListed(rest)
		s.failures.Note(requestAdoptPermissions, 1, err)
		if err == nil {
			break
		}
		select {
		case <-time.After(again):
		case <-ctx.Done():
			return nil
		}
	}
	s.do(func(l *loop) { l.engine.Model.SetAdopting(false) })
	return nil
}

// adoptTime is how long a command waits for adoptRest.
const adoptTime = 30 * time.Second

// allAdopted waits until the daemon knows all permissions in the kernel.
func (s *shared) allAdopted() error {
	select {
	case <-s.adopted:
		return nil
	case <-s.ended:
		return errEnded
	case <-time.After(adoptTime):
		return errors.New("permissions that the last daemon left are still taken over: try again in a minute")
	}
}

func (s *shared) adoptListed(rest *elements.Map) (failed error) {
	const atOnce = 1024
	piece := make([]cone.Permission, 0, atOnce)
	hand := func() bool {
		ok := s.do(func(l *loop) {
			var unknown []cone.Permission
			for _, p := range piece {
				if !l.engine.Model.Has(p.Key) {
					unknown = append(unknown, p)
				}
			}
			failed = l.adoptElements(unknown)
		})
		piece = piece[:0]
		return ok && failed == nil
	}
	err := rest.Keys(func(k cone.Key) bool {
		piece = append(piece, cone.Permission{Key: k})
		return len(piece) < atOnce || hand()
	})
	if err == nil && failed == nil {
		hand()
	}
	if failed == nil {
		failed = err
	}
	return failed
}
