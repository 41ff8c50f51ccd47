package daemon

import (
	"context"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/userrules"
)

// source answers the control socket; Reload and Revoke are the Daemon's.
type source struct{ *Daemon }

var _ control.Source = source{}

// Status is what "conenatd status" shows.
func (s source) Status() control.Status {
	d := s.Daemon
	d.readCounters()
	st := control.Status{
		Version: d.cfg.Version, PID: os.Getpid(), Started: d.wall(0), Process: readProcess(),
	}
	e := d.events.Stats()
	st.Events.Received, st.Events.Filtered = e.Received, e.Filtered
	st.Events.Malformed, st.Events.Overruns = e.Malformed, e.Overruns
	st.Events.ReadBuffer = e.ReadBuffer
	if n, err := d.conntrack.read(acct); err == nil {
		st.Accounting = n != 0
	}
	d.do(func() {
		m := d.engine.Model.Stats()
		st.Lifetime = d.cfg.Lifetime.Seconds()
		for _, n := range d.cfg.Subnets {
			st.Subnets = append(st.Subnets, d.subnet(n))
		}
		st.Outside = d.network.OutsideLinks()
		st.Warnings, st.Findings = d.warnings().status()
		st.Backend = d.backends.String()
		st.Helper.IPv4, st.Helper.IPv6 = d.helper(false), d.helper(true)
		if e := d.backends.expect; e != nil {
			st.Permissions.Expectations = e.Standing()
		}
		st.Conntrack = d.kernel
		st.Tables = d.tables
		st.Tables.Mapping.On = d.maps()
		st.Tables.Mapping.NotApplied = maps.Clone(d.applied.not)
		st.Tables.Guard.On = d.cfg.Guard && d.firewall.tables != nil
		st.Tables.Map.On, st.Tables.Map.Passed, st.Tables.Expected.Passed = d.backends.nft != nil, m.Passed, m.Through
		st.Permissions.Standing, st.Permissions.Refused = m.Standing, m.Refused
		st.Permissions.Waiting, st.Permissions.Limit = m.Waiting, d.limit()
		st.Flows, st.BrokenFlows, st.Counters.Healed = m.Flows, slices.Clone(d.brokenNow), d.healed
		st.Counters.Granted, st.Counters.Conflicts, st.Counters.Early = m.Granted, m.Conflicts, m.Early
		st.Counters.Compared, st.Counters.Remapped = m.Compared, m.Remapped
		st.Counters.Crowded = m.Crowded
		st.Counters.Repaired = byName(d.engine.Repaired[:], func(p int) string { return engine.Part(p).String() })
		st.Counters.Refused = byName(m.Refusals[:], reason)
		st.Counters.Revoked = byName(m.Revoked[:], reason)
		st.Counters.Skipped, st.Counters.SkippedLinks = byName(m.Skipped[:], reason), map[string]uint64{}
		for link, n := range d.engine.Model.Elsewhere() {
			st.Counters.SkippedLinks[link] = n.Flows
		}
		st.Counters.Failed = d.failures.totals()
		st.Latency.Count = d.latency.count
		st.Latency.P50 = microseconds(d.latency.quantile(0.50))
		st.Latency.P99 = microseconds(d.latency.quantile(0.99))
		st.Latency.Max = microseconds(d.latency.max)
	})
	return st
}

// maps reports whether endpoint-independent mapping is in force.
func (d *Daemon) maps() bool { return d.tables.Mapping.On && !d.applied.notInForce() && !d.overtaken }

// subnet is an enabled subnet as status shows it.
func (d *Daemon) subnet(s config.Subnet) control.Subnet {
	c := control.Subnet{
		Prefix: s.Prefix, Routed: s.Routed, Filtering: s.Filtering.String(), Mapping: config.KernelMapping.String(),
		Carried: d.carried(s),
	}
	if d.maps() {
		if s.Mapping == config.EndpointIndependentMapping {
			c.Mapping = s.Mapping.String()
		}
		c.Hairpin = d.cfg.Hairpin && s.Prefix.Addr().Is4()
	}
	return c
}

// readCounters lets the reconcile read the counters of our tables and of conntrack. It gives
// up after tablesTime, if the reconcile is too busy: the last reading holds.
func (d *Daemon) readCounters() {
	done := make(chan struct{})
	read := func() {
		defer close(done)
		var cfg config.Config
		if !d.do(func() { cfg = d.cfg.Config }) {
			return
		}
		t, err := d.firewall.read(cfg)
		d.failures.note(requestReadCounters, 1, err)
		k, err := d.readConntrack()
		d.failures.note(requestLookAtConntrack, 1, err)
		d.do(func() {
			d.tables = t
			if err == nil {
				d.kernel = k
			}
		})
	}
	wait, cancel := context.WithTimeout(context.Background(), tablesTime)
	defer cancel()
	select {
	case d.looks <- read:
		<-done
	case <-d.ended:
	case <-wait.Done():
	}
}

// tablesTime is how long a status waits for fresh counters.
const tablesTime = time.Second

func microseconds(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

func reason(r int) string { return cone.Reason(r).String() }

// byName returns the counts that are not 0, without those of something that has no name.
func byName(counts []uint64, name func(i int) string) map[string]uint64 {
	out := map[string]uint64{}
	for i, n := range counts {
		if n > 0 && name(i) != "" {
			out[name(i)] = n
		}
	}
	return out
}

// peers returns the prefix of a permission for several peers; for one peer it is invalid.
func peers(k cone.Key) (p netip.Prefix) {
	if k.Wild > 0 {
		p = k.Peers()
	}
	return p
}

var errEnded = engine.ErrEnded

// Permissions passes every claim to yield, a piece at a time, so that a slow
// reader does not hold up the loop.
func (s source) Permissions(yield func(control.Permission) bool) error {
	const atOnce = 256
	d := s.Daemon
	piece := make([]cone.View, 0, atOnce)
	var hidden *userrules.Covered
	for at := 0; at >= 0; {
		piece = piece[:0]
		ok := d.do(func() {
			hidden = d.hidden
			at = d.engine.Model.Walk(at, atOnce, func(v cone.View) {
				piece = append(piece, v)
			})
		})
		if !ok {
			return errEnded
		}
		for i := range piece {
			if !yield(d.permission(&piece[i], hidden)) {
				return nil
			}
		}
	}
	return nil
}

// limit is how many permissions may stand.
func (d *Daemon) limit() int {
	if n := d.cfg.MaxPermissions; n > 0 {
		return min(n, d.backends.Max())
	}
	return d.backends.Max()
}

// helper names the helper on anchors of one family, if there is one.
func (d *Daemon) helper(v6 bool) string {
	if d.backends.expect == nil {
		return ""
	}
	ipv4, ipv6 := d.backends.expect.Helpers()
	if v6 {
		return ipv6
	}
	return ipv4
}

// permission is a claim as the control socket shows it. A claim in the map is shown as refused
// if all its packets match a forward of the user's, which comes before the map: it admits
// nobody as long as that forward is there.
func (d *Daemon) permission(v *cone.View, hidden *userrules.Covered) control.Permission {
	p := control.Permission{
		Int: v.Int.Netip(), Ext: v.Ext.Netip(), Peer: v.Peer.Netip(), Peers: peers(v.Key), Zone: v.Zone,
		State: v.State.String(), Reason: v.Reason.String(), Backend: v.By.String(),
		Flows: v.Flows, Children: v.Children, Answered: v.Answered,
	}
	switch {
	case v.State != cone.StateStanding:
	case v.By == cone.ByMap && hidden.Bars(v.Permission):
		p.State, p.Reason = cone.StateRefused.String(), cone.ReasonForwarded.String()
	default:
		p.Since, p.Expires = d.wall(v.Since), d.wall(v.Expires)
	}
	return p
}
