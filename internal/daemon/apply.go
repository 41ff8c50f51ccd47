package daemon

import (
	"errors"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
)

// opsAtOnce is how many decisions are carried out in one piece.
const opsAtOnce = 1024

// apply carries out the model's decisions, in order. Consecutive ones of one kind
// share a batch. since is when the event that caused them was read, for the
// latency; zero if no event caused them.
func (d *Daemon) apply(since time.Duration) {
	for ops := d.model.Ops(); len(ops) > 0; ops = d.model.Ops() {
		for len(ops) > 0 {
			n := 1
			for n < min(len(ops), opsAtOnce) && ops[n].Kind == ops[0].Kind {
				n++
			}
			d.run(ops[:n], since)
			ops = ops[n:]
			d.beat()
		}
	}
}

// run carries out ops, which are of one kind.
func (d *Daemon) run(ops []cone.Op, since time.Duration) {
	switch ops[0].Kind {
	case cone.Grant:
		d.grant(ops, since)
	case cone.Revoke:
		d.failures.note(requestRevokePermissions, len(ops), d.backends.Revoke(ops))
	case cone.Refresh:
		d.backends.Refresh(ops, func(i int, by cone.Carriers) { d.onLost(ops[i].Permission, by) })
	case cone.Deny:
		d.deny(ops)
	case cone.Query:
		for i := range ops {
			d.query(&ops[i])
		}
	case cone.DropUnanswered:
		for i := range ops {
			d.dropUnanswered(&ops[i])
		}
	case cone.DropEarly:
		for i := range ops {
			d.dropEarly(&ops[i])
		}
	}
}

// deny keeps the kernel from learning the permissions of ops, and notes what the user
// revoked. Consecutive ops with the same reason and carriers go together.
func (d *Daemon) deny(ops []cone.Op) {
	for len(ops) > 0 {
		why, by, n := ops[0].Reason, ops[0].By, 1
		for n < len(ops) && ops[n].Reason == why && ops[n].By == by {
			n++
		}
		ps := d.collect(ops[:n])
		var errs []error
		if why == cone.ReasonRevoked {
			errs = append(errs, d.backends.NoteRevoked(ps))
		}
		if by&cone.ByMap != 0 {
			errs = append(errs, d.backends.Deny(ps, why))
		}
		d.failures.note(requestDenyPermissions, n, errors.Join(errs...))
		ops = ops[n:]
	}
}

// collect returns the permissions of ops, in a slice that the next call reuses.
func (d *Daemon) collect(ops []cone.Op) []cone.Permission {
	d.perms = d.perms[:0]
	for i := range ops {
		d.perms = append(d.perms, ops[i].Permission)
	}
	return d.perms
}

// grant makes the permissions of ops stand, except where a local socket would
// lose its packets. Before the grant it checks the sockets found by the last looks.
// Right after, granted asks the kernel, which takes as long as the grant itself. So
// a socket opened since the last look loses packets for microseconds at most.
func (d *Daemon) grant(ops []cone.Op, since time.Duration) {
	d.grants = d.grants[:0]
	for i := range ops {
		o := &ops[i]
		if r := d.barred(&o.Permission); r != cone.ReasonNone {
			d.model.Refused(d.now(), o.Permission, r, false)
			continue
		}
		o.By &= d.backends.carriers() // a backend may have been closed since the decision
		d.grants = append(d.grants, *o)
	}
	d.backends.Grant(d.grants, d.onFailed)
	now := d.now()
	for i := range d.grants {
		o := &d.grants[i]
		if o.By == 0 {
			continue
		}
		if since != 0 {
			d.latency.record(now - since)
		}
		d.granted(o.Permission, o.By)
	}
}

// barred returns why p must not be granted: a known socket of the gateway would lose packets,
// or p is for the gateway itself and no socket gets what p admits. Connected sockets do not
// count: they get nothing from other ports of the peer, and a resolver may have thousands.
func (d *Daemon) barred(p *cone.Permission) cone.Reason {
	if d.losesTo(p, d.served) {
		return cone.ReasonLocalSocket
	}
	if !d.model.IsSelf(p) {
		return cone.ReasonNone
	}
	return d.lacksSocket(p)
}

// lacksSocket returns ReasonNoSocket if no socket gets what p admits, a permission of the
// gateway itself.
func (d *Daemon) lacksSocket(p *cone.Permission) cone.Reason {
	switch waits, err := d.sockets.Serves(p.Int, p.Peer); {
	case err != nil:
		d.failures.note(requestLookForLocalSockets, 1, err, "ext", p.Ext)
		return cone.ReasonKernel
	case !waits:
		return cone.ReasonNoSocket
	}
	return cone.ReasonNone
}

// losesTo reports whether one of sockets would lose packets to p. A permission of the gateway
// itself takes none from a socket that also gets the packets at p.Int.
func (d *Daemon) losesTo(p *cone.Permission, sockets *gateway.PortSet) bool {
	if d.model.IsSelf(p) {
		return sockets.Takes(p.Ext, p.Int)
	}
	return sockets.Serves(p.Ext)
}

// granted tells the model that p stands by these carriers, unless a local socket gets what
// an expectation admits. It does not ask for the map, whose rule looks up sockets packet by
// packet: a short-lived socket must not cost the permission there, and the regular looks find
// one that stays.
func (d *Daemon) granted(p cone.Permission, by cone.Carriers) {
	if by&cone.ByExpectation == 0 {
		d.model.Granted(p)
		return
	}
	var served bool
	var err error
	if d.model.IsSelf(&p) {
		served, err = d.sockets.Takes(p.Ext, p.Int, p.Peer)
	} else {
		served, err = d.sockets.Serves(p.Ext, p.Peer)
	}
	switch {
	case err != nil:
		d.failures.note(requestLookForLocalSockets, 1, err, "ext", p.Ext)
		d.model.Refused(d.now(), p, cone.ReasonKernel, true)
	case served:
		d.model.Refused(d.now(), p, cone.ReasonLocalSocket, true)
	default:
		d.model.Granted(p)
	}
}

// failed tells the model that a carrier refused grant i of those under way, and keeps the
// first error for each reason for the log.
func (d *Daemon) failed(i int, by cone.Carriers, r cone.Reason, err error) {
	o := &d.grants[i]
	o.By &^= by
	d.model.Failed(d.now(), o.Permission, by, r)
	if err != nil && d.refusal[r] == nil {
		d.refusal[r] = err
	}
}

func (d *Daemon) query(o *cone.Op) {
	src, dst := o.FlowTuple()
	f, found, err := d.queries.Get(src, dst, o.FromZone)
	switch {
	case err != nil:
		d.failures.note(requestLookUpFlow, 1, err, "src", src, "dst", dst)
	case found && f.ID == o.ID:
		d.model.FlowSeen(d.now(), &f)
	default:
		d.model.FlowMissing(d.now(), o)
	}
}

// dropUnanswered deletes a child of a permission that ended, unless the inside
// host answered it: then it is a flow like any other.
func (d *Daemon) dropUnanswered(o *cone.Op) {
	src, dst := o.FlowTuple()
	f, found, err := d.queries.Get(src, dst, o.FromZone)
	if err == nil && found && f.ID == o.ID && !f.Status.Has(cone.StatusSeenReply) {
		_, err = d.queries.Delete(src, dst, o.FromZone, o.ID)
	}
	d.failures.note(requestDeleteUnansweredChild, 1, err, "src", src, "dst", dst)
}

// dropEarly deletes the flow of an early packet, unless a local socket gets its packets.
func (d *Daemon) dropEarly(o *cone.Op) {
	src, dst := o.FlowTuple()
	served, err := d.sockets.Serves(o.Ext, o.From.Addr)
	if err == nil && !served {
		_, err = d.queries.Delete(src, dst, o.FromZone, o.ID)
	}
	d.failures.note(requestDeleteEarlyFlow, 1, err, "src", src, "dst", dst)
}
