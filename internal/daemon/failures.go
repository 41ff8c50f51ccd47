package daemon

import (
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A request is the identifier (docs/control.md) of something that the daemon asks of the
// kernel. Those of the engine are engine.Request.
type request string

const (
	requestAdoptPermissions      request = "adopt_permissions"
	requestCarryPermissionOver   request = "carry_permission_over"
	requestFindUplinks           request = "find_uplinks"
	requestFollowFlows           request = "follow_flows"
	requestFilterConntrackEvents request = "filter_conntrack_events"
	requestLeaveTheOldBackend    request = "leave_the_old_backend"
	requestLookAtChanges         request = "look_at_changes"
	requestLookAtConntrack       request = "look_at_conntrack"
	requestLookAtListeners       request = "look_at_listeners"
	requestLookAtRoutes          request = "look_at_routes"
	requestLookAtSockets         request = "look_at_sockets"
	requestLookForHelpers        request = "look_for_helpers"
	requestLookForBroken         request = "look_for_broken_flows"
	requestNoteRevoked           request = "note_revoked"
	requestNoteUnsure            request = "note_unsure"
	requestReadStatistics        request = "read_statistics"
	requestReadCounters          request = "read_counters"
	requestReadMappings          request = "read_mappings"
	requestAssumeAddresses       request = "assume_addresses"
	requestReadTimeouts          request = "read_timeouts"
	requestReconcile             request = "reconcile"
	requestTurnOnAccounting      request = "turn_on_accounting"
)

// words is r as the log shows it.
func (r request) words() string { return strings.ReplaceAll(string(r), "_", " ") }

// failures logs what the kernel refused to do, one episode for each kind of request and
// errno, and counts it. Its methods may be called from any goroutine.
type failures struct {
	*episodes

	mu    sync.Mutex // guards count
	count map[request]uint64
}

func newFailures(log *slog.Logger, now func() time.Duration, reconcile time.Duration) *failures {
	return &failures{episodes: newEpisodes(log, now, reconcile), count: make(map[request]uint64)}
}

// note counts n requests that failed with err, if that is not nil; args describe the request
// in the log.
func (f *failures) note(r request, n int, err error, args ...any) {
	if err == nil || n == 0 {
		return
	}
	f.mu.Lock()
	f.count[r] += uint64(n)
	f.mu.Unlock()
	key := r.words()
	if errno := unix.Errno(0); errors.As(err, &errno) { // a new cause is a new episode
		key += ": " + errno.Error()
	}
	f.episodes.note(slog.LevelWarn, key, r.words(), uint64(n), append(args, "err", err)...)
}

// totals returns the counts since the start, by kind.
func (f *failures) totals() map[string]uint64 {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make(map[string]uint64, len(f.count))
	for r, n := range f.count {
		out[string(r)] = n
	}
	return out
}
