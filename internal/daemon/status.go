package daemon

import (
	"errors"
	"os"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
)

// source answers the control socket; Reload and Revoke are the Daemon's.
type source struct{ *Daemon }

var _ control.Source = source{}

// Status is what "conenatd status" shows.
func (s source) Status() control.Status {
	d := s.Daemon
	st := control.Status{
		Version: d.cfg.Version, PID: os.Getpid(), Started: d.start, Backend: "expect",
	}
	st.Helper.IPv4, st.Helper.IPv6 = d.helper4, d.helper6
	e := d.events.Stats()
	st.Events.Received, st.Events.Filtered = e.Received, e.Filtered
	st.Events.Malformed, st.Events.Overruns = e.Malformed, e.Overruns
	st.Events.ReadBuffer = e.ReadBuffer
	if n, err := settings(d.cfg.Socket).read(acct); err == nil {
		st.Accounting = n != 0
	}
	d.do(func() {
		m := d.model.Stats()
		st.Lifetime = d.cfg.Lifetime.String()
		for _, n := range d.cfg.Subnets {
			st.Subnets = append(st.Subnets, control.Subnet(n))
		}
		st.Outside = d.network.OutsideLinks()
		st.Warnings = d.warnings()
		st.Guard = d.guard
		st.Guard.On = d.cfg.Guard && d.firewall.table != nil
		st.Permissions.Standing, st.Permissions.Refused = m.Standing, m.Refused
		st.Permissions.Waiting, st.Permissions.Limit = m.Waiting, d.backend.Max()
		st.Flows = m.Flows
		st.Counters.Granted, st.Counters.Conflicts, st.Counters.Early = m.Granted, m.Conflicts, m.Early
		st.Counters.Crowded = m.Crowded
		st.Counters.Repaired = d.repaired
		st.Counters.Refused = byReason(&m.Refusals)
		st.Counters.Revoked = byReason(&m.Revoked)
		st.Counters.Skipped = byReason(&m.Skipped)
		st.Latency.Count = d.latency.count
		st.Latency.P50 = microseconds(d.latency.quantile(0.50))
		st.Latency.P99 = microseconds(d.latency.quantile(0.99))
		st.Latency.Max = microseconds(d.latency.max)
	})
	return st
}

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func byReason(counts *[cone.Reasons]uint64) map[string]uint64 {
	out := map[string]uint64{}
	for r, n := range counts {
		if n > 0 {
			out[cone.Reason(r).String()] = n
		}
	}
	return out
}

var errEnded = errors.New("the daemon is stopping")

// Permissions gives every claim to yield, a piece at a time, so that a slow
// reader does not hold up the loop.
func (s source) Permissions(yield func(control.Permission) bool) error {
	const atOnce = 256
	piece := make([]cone.View, 0, atOnce)
	for at := 0; at >= 0; {
		piece = piece[:0]
		ok := s.Daemon.do(func() {
			at = s.Daemon.model.Walk(at, atOnce, func(v cone.View) { piece = append(piece, v) })
		})
		if !ok {
			return errEnded
		}
		for i := range piece {
			if !yield(s.Daemon.permission(&piece[i])) {
				return nil
			}
		}
	}
	return nil
}

func (d *Daemon) permission(v *cone.View) control.Permission {
	p := control.Permission{
		Int: v.Int.Netip(), Ext: v.Ext.Netip(), Peer: v.Peer.Netip(), Zone: v.Zone,
		State: v.State.String(), Reason: v.Reason.String(),
		Flows: v.Flows, Children: v.Children, Answered: v.Answered,
	}
	if v.State == cone.StateStanding {
		p.Backend = "expect"
		p.Since, p.Expires = d.start.Add(v.Since), d.start.Add(v.Expires)
	}
	return p
}
