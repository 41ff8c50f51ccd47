package daemon

import (
	"context"
	"log/slog"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/watch"
)

// observe tells watchers, and the log at its level debug. The loop calls it.
func (s *shared) observe(e cone.Event) {
	s.watchers.Publish(e)
	if !s.log.Enabled(context.Background(), slog.LevelDebug) {
		return
	}
	args := []any{"int", e.Int.Netip(), "ext", e.Ext.Netip(), "peer", e.Peers()}
	if e.Kind == cone.EventChild || e.Kind == cone.EventChildGone {
		args = append(args, "from", e.From.Netip())
	}
	s.log.Debug(e.Kind.String(), append(args, "by", e.By.String(), "reason", e.Reason.String())...)
}

// Watch tells what happens from now on (control.Source).
func (s source) Watch(ctx context.Context, yield func(control.Event) bool) error {
	w, err := s.watchers.Add()
	if err != nil {
		return err
	}
	defer s.watchers.Remove(w)
	if !yield(control.Event{Time: time.Now().Round(time.Millisecond), Event: control.EventBegin}) {
		return nil
	}
	w.Follow(ctx, s.ended, func(x watch.Event) bool { return yield(controlEvent(&x)) })
	return nil
}

// controlEvent is an event as the control socket shows it.
func controlEvent(e *watch.Event) control.Event {
	at := e.At.Round(time.Millisecond)
	if e.Lost > 0 {
		return control.Event{Time: at, Event: control.EventLost, Lost: e.Lost}
	}
	c := control.Event{
		Time: at, Event: e.Kind.String(), Int: e.Int.Netip(), Ext: e.Ext.Netip(), Peer: e.Peer.Netip(), Peers: peers(e.Key), Zone: e.Zone,
		Backend: e.By.String(), Reason: e.Reason.String(),
	}
	if e.Kind == cone.EventChild || e.Kind == cone.EventChildGone {
		c.From = e.From.Netip()
	}
	return c
}

// standing returns the permissions that stand. It returns false if the loop ends or stop is closed first.
func (s *shared) standing(stop <-chan struct{}) (all []cone.Permission, ok bool) {
	const atOnce = 256
	for at := 0; at >= 0; {
		var some []cone.Permission
		next := 0
		ok := s.doUnless(stop, func(l *loop) {
			next = l.engine.Model.Walk(at, atOnce, func(v cone.View) {
				if v.State == cone.StateStanding {
					some = append(some, v.Permission)
				}
			})
		})
		if !ok {
			return nil, false
		}
		all, at = append(all, some...), next
	}
	return all, true
}
