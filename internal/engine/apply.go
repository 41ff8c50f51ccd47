package engine

import (
	"errors"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// opsAtOnce is how many decisions are carried out in one piece.
const opsAtOnce = 1024

// Apply carries out the model's decisions, in order for each carrier. Consecutive ones of one
// kind share a batch. A packet may wait for an expectation, so what the map and ended children
// still need follows the expectations (see finish). since is when the event that caused the
// decisions was read, for the latency; zero if no event caused them.
func (e *Engine) Apply(since time.Duration) {
	for ops := e.Model.Ops(); len(ops) > 0; ops = e.Model.Ops() {
		for len(ops) > 0 {
			n := 1
			for n < min(len(ops), opsAtOnce) && ops[n].Kind == ops[0].Kind {
				n++
			}
			e.run(ops[:n], since)
			ops = ops[n:]
			e.cfg.Between()
		}
		e.finish()
	}
}

// run carries out ops, which are of one kind.
func (e *Engine) run(ops []cone.Op, since time.Duration) {
	switch ops[0].Kind {
	case cone.Grant:
		e.grant(ops, since)
	case cone.Revoke:
		e.revoke(ops, cone.ByExpectation)
		e.unmapped = append(e.unmapped, ops...)
	case cone.DropUnanswered, cone.DropChild:
		e.orphans = append(e.orphans, ops...)
	case cone.Renew:
		e.finish()
		e.renew(ops)
	case cone.Deny:
		e.finish()
		e.deny(ops)
	case cone.Query:
		for i := range ops {
			e.query(&ops[i])
		}
	case cone.DropEarly:
		for i := range ops {
			e.dropEarly(&ops[i])
		}
	}
}

// finish carries out what run postponed: it ends permissions in the map, and then drops their
// children, so that none can take their place. If an expectation with the same Key was
// granted meanwhile, it is the one that admits children: conntrack looks for it before any rule.
func (e *Engine) finish() {
	for ops := range slices.Chunk(e.unmapped, opsAtOnce) {
		e.revoke(ops, cone.ByMap)
		e.cfg.Between()
	}
	for i := range e.orphans {
		e.dropChild(&e.orphans[i])
	}
	e.unmapped, e.orphans = e.unmapped[:0], e.orphans[:0]
}

// deny keeps the kernel from learning the permissions of ops, and notes what the user
// revoked. Consecutive ops with the same reason and carriers go together.
func (e *Engine) deny(ops []cone.Op) {
	for len(ops) > 0 {
		why, by, n := ops[0].Reason, ops[0].By, 1
		for n < len(ops) && ops[n].Reason == why && ops[n].By == by {
			n++
		}
		ps := e.collect(ops[:n])
		var errs []error
		if why == cone.ReasonRevoked {
			errs = append(errs, e.noteRevoked(ps))
		}
		if by&cone.ByMap != 0 {
			errs = append(errs, e.denyInMap(ps, why))
		}
		e.cfg.Failed(DenyPermissions, n, errors.Join(errs...))
		ops = ops[n:]
	}
}

// collect returns the permissions of ops, in a slice that the next call reuses.
func (e *Engine) collect(ops []cone.Op) []cone.Permission {
	e.perms = e.perms[:0]
	for i := range ops {
		e.perms = append(e.perms, ops[i].Permission)
	}
	return e.perms
}

// grant makes the permissions of ops stand, except where a local socket would
// lose its packets. Before the grant it checks the sockets found by the last looks.
// Right after, granted asks the kernel, which takes as long as the grant itself. So
// a socket opened since the last look loses packets for microseconds at most.
func (e *Engine) grant(ops []cone.Op, since time.Duration) {
	e.grants = e.grants[:0]
	for i := range ops {
		o := &ops[i]
		if r := e.barred(&o.Permission); r != cone.ReasonNone {
			e.Model.Refused(e.cfg.Now(), o.Permission, r, false)
			continue
		}
		o.By &= e.Kernel.Carriers() // a backend may have been closed since the decision
		e.grants = append(e.grants, *o)
	}
	e.grantOps(e.grants)
	now := e.cfg.Now()
	for i := range e.grants {
		o := &e.grants[i]
		if o.By == 0 {
			continue
		}
		if since != 0 {
			e.cfg.Took(now - since)
		}
		e.granted(o.Permission, o.By)
	}
}

// failed tells the model that the carrier at work refused the grant of permission i of the
// batch, and keeps the first error for each reason for the log.
func (e *Engine) failed(i int, r cone.Reason, err error) {
	o, by := &e.grants[e.batch.index[i]], e.by
	o.By &^= by
	e.Model.Failed(e.cfg.Now(), o.Permission, by, r)
	if err != nil && e.refusal[r] == nil {
		e.refusal[r] = err
	}
}

func (e *Engine) query(o *cone.Op) {
	src, dst := o.FlowTuple()
	asked := e.cfg.Now() // before: the process may be stopped when the kernel has answered
	f, found, err := e.Kernel.Flows.Get(src, dst, o.FromZone)
	switch {
	case err != nil:
		e.cfg.Failed(LookUpFlow, 1, err, "src", src, "dst", dst)
	case found && f.ID == o.ID:
		e.Model.FlowSeen(asked, &f)
	default:
		e.Model.FlowMissing(asked, o)
	}
}

// dropChild deletes a child. One of a permission that ended stays if the inside host answered
// it: then it is a flow like any other.
func (e *Engine) dropChild(o *cone.Op) {
	src, dst := o.FlowTuple()
	f, found, err := e.Kernel.Flows.Get(src, dst, o.FromZone)
	if err == nil && found && f.ID == o.ID && (o.Kind == cone.DropChild || !f.Status.Has(cone.StatusSeenReply)) {
		_, err = e.Kernel.Flows.Delete(src, dst, o.FromZone, o.ID)
	}
	e.cfg.Failed(DeleteUnansweredChild, 1, err, "src", src, "dst", dst)
}

// dropEarly deletes the flow of an early packet, unless a local socket gets its packets.
func (e *Engine) dropEarly(o *cone.Op) {
	src, dst := o.FlowTuple()
	served, err := e.Kernel.Sockets.Serves(o.Ext, o.From.Addr)
	if err == nil && !served {
		_, err = e.Kernel.Flows.Delete(src, dst, o.FromZone, o.ID)
	}
	e.cfg.Failed(DeleteEarlyFlow, 1, err, "src", src, "dst", dst)
}
