package engine

import (
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Config is what an Engine needs of its surroundings.
type Config struct {
	// Now is the time, as the model counts it.
	Now func() time.Duration
	// Failed is told that the kernel failed n requests; args describe them for the log. It
	// is called with a nil error if all went well.
	Failed func(r Request, n int, err error, args ...any)
	// Took is told how long after its event a permission stood.
	Took func(time.Duration)
	// Between is called between pieces of work.
	Between func()
}

// A Request is the identifier (docs/control.md) of something that the engine asks of the
// kernel.
type Request string

// The requests.
const (
	DeleteEarlyFlow       Request = "delete_early_flow"
	DeleteUnansweredChild Request = "delete_unanswered_child"
	DenyPermissions       Request = "deny_permissions"
	LookForLocalSockets   Request = "look_for_local_sockets"
	LookUpFlow            Request = "look_up_flow"
	RevokePermissions     Request = "revoke_permissions"
)

// A Part is something of ours in the kernel that somebody else can take away.
type Part uint8

// The parts.
const (
	PartAnchor Part = iota
	PartExpectation
	PartElement
	PartTableSize // of the expectation table; the engine's caller watches it

	Parts // the number of parts
)

// String returns the identifier of p (docs/control.md).
func (p Part) String() string {
	return [...]string{"anchors", "expectations", "elements", "expect_max"}[p]
}

// An Engine carries out what a model decides. It is not safe for concurrent use.
type Engine struct {
	Model  *cone.Model
	Kernel Kernel
	// Repaired counts the parts that somebody took away and that were put back.
	Repaired [Parts]uint64

	cfg            Config
	served, lately Ports
	refusal        [cone.Reasons]error // the kernel's first error since TakeRefusal

	// The work in progress, kept here to avoid allocations.
	batch    batch
	by       cone.Carriers // whose batch it is
	perms    []cone.Permission
	grants   []cone.Op
	unmapped []cone.Op // to be revoked in the map; see finish
	orphans  []cone.Op // to be dropped if unanswered
	onFailed func(i int, r cone.Reason, err error)
	onLost   func(i int)
}

// New returns an Engine for m and k. Call SetServed before the first Apply.
func New(m *cone.Model, k Kernel, c Config) *Engine {
	e := &Engine{Model: m, Kernel: k, cfg: c}
	e.onFailed = e.failed
	e.onLost = func(i int) { e.restore(e.batch.perms[i], e.by) }
	return e
}

// TakeRefusal returns the kernel's first error for refusals with reason r since the last
// call, or nil.
func (e *Engine) TakeRefusal(r cone.Reason) error {
	err := e.refusal[r]
	e.refusal[r] = nil
	return err
}

// FlowGone handles the event of a flow that is gone.
func (e *Engine) FlowGone(now time.Duration, f *cone.Flow) {
	if cone.IsAnchor(f.Src, f.Dst) {
		e.recheckAnchor(f)
		return
	}
	e.Model.FlowGone(now, f)
}

// SnapshotFlow handles one flow of a dump.
func (e *Engine) SnapshotFlow(now time.Duration, f *cone.Flow) {
	e.Model.SnapshotFlow(now, f)
	if cone.IsAnchor(f.Src, f.Dst) && !f.Helped {
		e.recheckAnchor(f) // our rules know children by the anchor's helper
	}
}

// recheckAnchor rechecks the permission whose anchor f is, or was. It ignores anchors that
// were deleted by a revocation: the carrier has forgotten them.
func (e *Engine) recheckAnchor(f *cone.Flow) {
	if e.Kernel.Expectations == nil {
		return
	}
	if k, ok := e.Kernel.Expectations.Anchored(f.Src, f.Dst, f.OrigZone); ok {
		if e.Model.Recheck(k) {
			e.Repaired[PartAnchor]++
		}
	}
}

// restore grants p again, which a carrier has lost, unless p has ended meanwhile.
func (e *Engine) restore(p cone.Permission, by cone.Carriers) {
	if !e.Model.Missing(e.cfg.Now(), p, by) {
		return
	}
	if by == cone.ByMap {
		e.Repaired[PartElement]++
	} else {
		e.Repaired[PartExpectation]++
	}
}
