package daemon

import (
	"cmp"
	"context"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/handover"
)

// source answers the control socket; Reload, Revoke and Flush are those of shared.
type source struct{ *shared }

var _ control.Source = source{}

// Status is what "conenatd status" shows.
func (s source) Status() control.Status {
	s.readCounters()
	st := control.Status{
		Version: s.given.Version, PID: os.Getpid(), Started: s.wall(0), Process: readProcess(),
	}
	e := s.events.Stats()
	st.Events.Received, st.Events.Filtered = e.Received, e.Filtered
	st.Events.Malformed, st.Events.Overruns = e.Malformed, e.Overruns
	st.Events.ReadBuffer = e.ReadBuffer
	if n, err := s.conntrack.Read(handover.Acct); err == nil {
		st.Accounting = n != 0
	}
	s.do(func(l *loop) {
		m := l.engine.Model.Stats()
		if st.Events.Mode = string(config.AllEvents); l.engine.Model.Lean() {
			st.Events.Mode = string(config.LeanEvents)
		}
		st.Events.Quiet = l.quiet
		st.Lifetime = l.cfg.Lifetime.Seconds()
		for _, n := range l.cfg.Subnets {
			st.Subnets = append(st.Subnets, l.subnet(n))
		}
		st.Outside, st.OutsideIPv6Only = l.network.OutsideLinks(), l.network.OutsideLinksIPv6Only()
		st.PeerGroups, st.ExcludePeerPorts = l.cfg.PeerGroups, l.excludedPeerPorts()
		warnings := l.warnings()
		st.Warnings, st.Findings = warnings.texts(), warnings
		st.Backend = l.backends.String()
		st.Helper.IPv4, st.Helper.IPv6 = l.helper(false), l.helper(true)
		if e := l.backends.expect; e != nil {
			st.Permissions.Expectations = e.Standing()
		}
		st.Conntrack = l.kernel
		st.Tables = l.tables
		st.Tables.Mapping.On = l.maps()
		st.Tables.Mapping.NotApplied = l.applied.Not()
		st.Tables.Guard.On = l.cfg.Guard && l.features.nftables
		passed := l.engine.Model.Passed()
		st.Tables.Map.On, st.Tables.Map.Passed, st.Tables.Expected.Passed = l.backends.nft != nil, passed.Mapped, passed.Expected
		st.Permissions.Standing, st.Permissions.Refused = m.Standing, m.Refused
		st.Permissions.Waiting, st.Permissions.Limit = m.Waiting, l.limit()
		st.Permissions.Helped = m.Helped
		st.Flows, st.BrokenFlows, st.Counters.Healed = m.Flows, slices.Clone(l.brokenNow), l.healed
		st.Counters.Decisions = control.Decisions(m.Decisions)
		st.Counters.Repaired = byName(l.engine.Repaired[:], func(p int) string { return engine.Part(p).String() })
		st.Counters.Refused = byName(m.Refusals[:], reason)
		st.Counters.Revoked = byName(m.Revoked[:], reason)
		st.Counters.Skipped, st.Counters.SkippedLinks = byName(m.Skipped[:], reason), map[string]uint64{}
		for link, n := range l.engine.Model.Elsewhere() {
			st.Counters.SkippedLinks[link] = n.Flows
		}
		st.Counters.Failed, st.Counters.AuditLost = s.failures.Totals(), s.auditor.Missing()
		st.Latency = latencyStatus(&l.latency)
	})
	return st
}

func (l *loop) excludedPeerPorts() (all []control.PortRange) {
	for _, r := range config.PortRanges(l.cfg.ExcludePeerPorts) {
		all = append(all, control.PortRange(r))
	}
	return all
}

// maps reports whether endpoint-independent mapping is in force.
func (l *loop) maps() bool { return l.tables.Mapping.On && !l.applied.NotInForce() && !l.overtaken }

// subnet is an enabled subnet as status shows it.
func (l *loop) subnet(s config.Subnet) control.Subnet {
	c := control.Subnet{
		Prefix: s.Prefix, Routed: s.Routed, Filtering: s.Filtering.String(), Mapping: config.KernelMapping.String(),
		Carried: l.carried(s), Blocked: l.decisions[s.Prefix].blocked(),
	}
	if l.maps() {
		if s.Mapping == config.EndpointIndependentMapping {
			c.Mapping = s.Mapping.String()
		}
		c.Hairpin = l.cfg.Hairpin && s.Prefix.Addr().Is4()
	}
	return c
}

// readTables reads the counters of our tables, for the loop too.
func (r *reconciler) readTables(cfg config.Config) error {
	t, err := r.firewall.read(cfg)
	unsure := r.firewall.unsure.warnings()
	r.do(func(l *loop) { l.tables, l.unsureWarnings = t, unsure })
	return err
}

// readCounters lets the reconcile read the counters of our tables and of conntrack. It gives
// up after tablesTime, if the reconcile or the kernel is too busy: the last reading holds.
func (s *shared) readCounters() {
	done := make(chan struct{})
	read := func(r *reconciler) {
		defer close(done)
		var cfg config.Config
		if !r.do(func(l *loop) { cfg = l.cfg }) {
			return
		}
		r.failures.Note(requestReadCounters, 1, r.readTables(cfg))
		k, err := r.readConntrack()
		r.failures.Note(requestLookAtConntrack, 1, err)
		r.do(func(l *loop) {
			if err == nil {
				l.kernel = k
			}
		})
	}
	wait, cancel := context.WithTimeout(context.Background(), tablesTime)
	defer cancel()
	select {
	case s.looks <- read:
	case <-s.ended:
		return
	case <-wait.Done():
		return
	}
	select {
	case <-done:
	case <-wait.Done(): // somebody else keeps the kernel's tables locked
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
	if k.HostBits > 0 {
		p = k.Peers()
	}
	return p
}

var errEnded = engine.ErrEnded

// Permissions passes every claim to yield, a piece at a time, so that a slow
// reader does not hold up the loop.
func (s source) Permissions(yield func(control.Permission) bool) error {
	const atOnce = 256
	if err := s.showAll(listAge); err != nil {
		return err
	}
	piece := make([]shownView, 0, atOnce)
	for at := 0; at >= 0; {
		piece = piece[:0]
		ok := s.do(func(l *loop) {
			at = l.engine.Model.Walk(at, atOnce, func(v cone.View) {
				piece = append(piece, shownView{v, l.lost(&v)})
			})
		})
		if !ok {
			return errEnded
		}
		for i := range piece {
			if !yield(s.permission(&piece[i].View, piece[i].lost)) {
				return nil
			}
		}
	}
	return nil
}

// limit is how many permissions may stand.
func (l *loop) limit() int {
	if n := l.cfg.MaxPermissions; n > 0 {
		return min(n, l.backends.Max())
	}
	return l.backends.Max()
}

// helper names the helper on anchors of one family, if there is one.
func (l *loop) helper(v6 bool) string {
	if l.backends.expect == nil {
		return ""
	}
	ipv4, ipv6 := l.backends.expect.Helpers()
	if v6 {
		return ipv6
	}
	return ipv4
}

// A shownView is a claim that is listed; lost says why its children are lost, if they are.
type shownView struct {
	cone.View
	lost cone.Reason
}

// lost says why the children of a claim that stands are lost. It returns ReasonNone if they are not.
func (l *loop) lost(v *cone.View) cone.Reason {
	host, bits := v.Int.Addr.Netip(), -1
	var d decision
	for _, s := range l.cfg.Subnets {
		if s.Prefix.Contains(host) && s.Prefix.Bits() > bits {
			d, bits = l.decisions[s.Prefix], s.Prefix.Bits()
		}
	}
	return d.lost(v)
}

// permission is a claim as the control socket shows it. A claim in the map is shown as refused
// if all its packets match a forward of the user's, which comes before the map: it admits
// nobody as long as that forward is there. lost says why what it admits is lost, if it is.
func (s *shared) permission(v *cone.View, lost cone.Reason) control.Permission {
	p := control.Permission{
		Int: v.Int.Netip(), Ext: v.Ext.Netip(), Peer: v.Peer.Netip(), Peers: peers(v.Key), Zone: v.Zone,
		State: v.State.String(), Reason: v.Reason.String(), Backend: v.By.String(),
		Flows: v.Flows, Children: v.Children, Answered: v.Answered,
	}
	switch {
	case v.State != cone.StateStanding:
	case v.By == cone.ByMap && v.Hidden:
		p.State, p.Reason = cone.StateRefused.String(), cone.ReasonForwarded.String()
	default:
		p.Since, p.Expires = s.wall(v.Since), s.wall(v.Expires)
		p.Reason = cmp.Or(lost, v.Reason).String()
	}
	return p
}
