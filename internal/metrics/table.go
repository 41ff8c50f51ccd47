package metrics

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/conenatd/conenatd/internal/control"
)

// all has every metric but the histogram. docs/metrics.md has the same ones.
var all = append(table, ofDecisions()...)

// table has the metrics that are not members of control.Decisions.
var table = []metric{
	{"build_info", "Version of conenatd and of Go; the value is 1.", prometheus.GaugeValue, []string{"version", "goversion"}, build},
	gauge("start_time_seconds", "Start of the daemon, in seconds since 1970.", func(s *control.Status) float64 { return float64(s.Started.UnixMilli()) / 1e3 }),
	gauges("findings", "id", "What does not work, by the identifiers of status.", func(s *control.Status) map[string]uint64 { return byID(s.Findings) }),

	gauges("permissions", "state", "Permissions by state.", func(s *control.Status) map[string]uint64 {
		p := s.Permissions
		return map[string]uint64{"standing": uint64(p.Standing), "refused": uint64(p.Refused), "waiting": uint64(p.Waiting)}
	}),
	gauge("permissions_limit", "Limit of standing permissions.", func(s *control.Status) int { return s.Permissions.Limit }),
	gauge("expectations", "Permissions that stand as expectations.", func(s *control.Status) int { return s.Permissions.Expectations }),
	gauge("helped_pairs", "Pairs of host and peer between which a conntrack helper of the user's works.", func(s *control.Status) int { return s.Permissions.Helped }),
	gauge("flows", "Flows that support or belong to permissions.", func(s *control.Status) int { return s.Flows }),
	gauge("broken_flows", "Flows that, at the last check, left with a source that the rules would not give them now.", func(s *control.Status) int { return broken(s.BrokenFlows) }),

	counters("permissions_refused", "reason", "Permissions refused.", func(s *control.Status) map[string]uint64 { return s.Counters.Refused }),
	counters("permissions_revoked", "reason", "Permissions that ended.", func(s *control.Status) map[string]uint64 { return s.Counters.Revoked }),
	counters("flows_skipped", "reason", "Flows that led to no permission.", func(s *control.Status) map[string]uint64 { return s.Counters.Skipped }),
	counter("flows_healed", "Broken flows that were ended.", func(s *control.Status) uint64 { return s.Counters.Healed }),
	counter("audit_lost", "Records that the audit log does not have.", func(s *control.Status) uint64 { return s.Counters.AuditLost }),
	counters("repairs", "part", "Things missing from the kernel that were restored.", func(s *control.Status) map[string]uint64 { return s.Counters.Repaired }),
	counters("requests_failed", "request", "Requests that the kernel failed.", func(s *control.Status) map[string]uint64 { return s.Counters.Failed }),

	counters("children_admitted", "by", "First packets of children, and of expected flows of other helpers.", func(s *control.Status) map[string]uint64 {
		return map[string]uint64{"nft": s.Tables.Map.Admitted, "expect": s.Tables.Expected.Admitted}
	}),
	counters("children_passed", "by", "Those of children_admitted that the user's firewall let pass.", func(s *control.Status) map[string]uint64 {
		return map[string]uint64{"nft": s.Tables.Map.Passed, "expect": s.Tables.Expected.Passed}
	}),
	counter("permissions_learned", "Permissions that the kernel added by itself.", func(s *control.Status) uint64 { return s.Tables.Map.Learned }),
	counter("permissions_not_learned", "Permissions that the kernel did not add because of learn_rate.", func(s *control.Status) uint64 { return s.Tables.Map.Limited }),
	counter("tables_repaired", "Changes by others to conenatd's tables that it undid.", func(s *control.Status) uint64 { return s.Tables.Repaired }),
	counters("guard_dropped_packets", "reason", "Packets from outside that the guard dropped.", func(s *control.Status) map[string]uint64 {
		dropped := byMember(s.Tables.Guard)
		dropped["no_socket"] = dropped["drops"]
		delete(dropped, "drops")
		return dropped
	}),
	counters("mapping_flows", "result", "Flows of endpoint-independent mapping that were not simply mapped.", func(s *control.Status) map[string]uint64 {
		return byMember(s.Tables.Mapping)
	}),
	gauges("mapping_not_applied", "reason", "Live flows without their mapping at the last reconcile.", func(s *control.Status) map[string]uint64 { return s.Tables.Mapping.NotApplied }),

	counter("events_received", "Conntrack events received.", func(s *control.Status) uint64 { return s.Events.Received }),
	counter("events_filtered", "Events received that are not of interest.", func(s *control.Status) uint64 { return s.Events.Filtered }),
	counter("events_malformed", "Events that could not be decoded.", func(s *control.Status) uint64 { return s.Events.Malformed }),
	counter("event_overruns", "Overruns of the event socket; each is followed by a dump.", func(s *control.Status) uint64 { return s.Events.Overruns }),
	gauge("event_buffer_bytes", "Receive buffer of the event socket.", func(s *control.Status) int { return s.Events.ReadBuffer }),

	gauge("conntrack_entries", "Entries of the conntrack table.", func(s *control.Status) int { return s.Conntrack.Entries }),
	gauge("conntrack_entries_limit", "nf_conntrack_max; 0 is no limit.", func(s *control.Status) int { return s.Conntrack.Max }),
	counter("conntrack_insert_failed", "Packets dropped because their new entry could not be put into the table.", func(s *control.Status) uint64 { return s.Conntrack.InsertFailed }),
	counter("conntrack_dropped", "Packets dropped by conntrack, those of conntrack_insert_failed included.", func(s *control.Status) uint64 { return s.Conntrack.Drop }),
	counter("conntrack_early_dropped", "Entries removed to make room in a full table.", func(s *control.Status) uint64 { return s.Conntrack.EarlyDrop }),
	counter("conntrack_invalid", "Packets that cannot be tracked.", func(s *control.Status) uint64 { return s.Conntrack.Invalid }),
	counter("conntrack_errors", "ICMP messages that cannot be tracked.", func(s *control.Status) uint64 { return s.Conntrack.Error }),
	counter("conntrack_search_restarts", "Lookups that restarted because the table changed.", func(s *control.Status) uint64 { return s.Conntrack.SearchRestart }),
	counter("conntrack_expectations_made", "Expectations made by all programs and helpers.", func(s *control.Status) uint64 { return s.Conntrack.ExpectationsMade }),
	counter("conntrack_expectations_ended", "Expectations ended by all programs and helpers.", func(s *control.Status) uint64 { return s.Conntrack.ExpectationsEnded }),
	counter("conntrack_expected_flows", "Flows that an expectation admitted.", func(s *control.Status) uint64 { return s.Conntrack.Expected }),

	gauge("goroutines", "Goroutines of the daemon.", func(s *control.Status) int { return s.Process.Goroutines }),
	gauge("open_files", "Open file descriptors of the daemon.", func(s *control.Status) int { return s.Process.Files }),
	gauge("resident_memory_bytes", "Memory of the daemon.", func(s *control.Status) uint64 { return s.Process.Resident }),
	gauge("heap_bytes", "Bytes of objects, garbage included.", func(s *control.Status) uint64 { return s.Process.Heap }),
}
