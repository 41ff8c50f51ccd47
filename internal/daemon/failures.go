package daemon

import "github.com/conenatd/conenatd/internal/episodes"

// The requests of the daemon. Those of the engine are engine.Request.
const (
	requestAdoptPermissions      episodes.Request = "adopt_permissions"
	requestCarryPermissionOver   episodes.Request = "carry_permission_over"
	requestFindUplinks           episodes.Request = "find_uplinks"
	requestFollowFlows           episodes.Request = "follow_flows"
	requestFilterConntrackEvents episodes.Request = "filter_conntrack_events"
	requestLeaveTheOldBackend    episodes.Request = "leave_the_old_backend"
	requestLookAtChanges         episodes.Request = "look_at_changes"
	requestLookAtConntrack       episodes.Request = "look_at_conntrack"
	requestLookAtListeners       episodes.Request = "look_at_listeners"
	requestLookAtRoutes          episodes.Request = "look_at_routes"
	requestLookAtSockets         episodes.Request = "look_at_sockets"
	requestLookForHelpers        episodes.Request = "look_for_helpers"
	requestLookForBroken         episodes.Request = "look_for_broken_flows"
	requestNoteRevoked           episodes.Request = "note_revoked"
	requestNoteUnsure            episodes.Request = "note_unsure"
	requestReadStatistics        episodes.Request = "read_statistics"
	requestReadCounters          episodes.Request = "read_counters"
	requestReadMappings          episodes.Request = "read_mappings"
	requestAssumeAddresses       episodes.Request = "assume_addresses"
	requestReadTimeouts          episodes.Request = "read_timeouts"
	requestReconcile             episodes.Request = "reconcile"
	requestTurnOnAccounting      episodes.Request = "turn_on_accounting"
)
