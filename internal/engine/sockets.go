package engine

import (
	"github.com/conenatd/conenatd/internal/cone"
)

// SetServed sets the local sockets that the last looks found: those that two looks found,
// and those that either of them found.
func (e *Engine) SetServed(lasting, lately Ports) { e.served, e.lately = lasting, lately }

// ReviewSockets withdraws the permissions on ports of lasting sockets, permissions of the
// gateway itself whose sockets are gone, and expectations that could take packets from
// connected sockets.
func (e *Engine) ReviewSockets() {
	e.Model.Review(e.cfg.Now(), func(p cone.Permission) cone.Reason {
		switch {
		case e.losesTo(&p, e.served):
			return cone.ReasonLocalSocket
		case e.Model.IsSelf(&p) && !e.lately.Serves(p.Int) && e.lacksSocket(&p) == cone.ReasonNoSocket: // and no new one
			return cone.ReasonNoSocket
		}
		return cone.ReasonNone
	})
	e.Model.SetConnected(e.cfg.Now(), e.served.Connected())
}

// barred returns why p must not be granted: a known socket of the gateway would lose packets,
// or p is for the gateway itself and no socket gets what p admits. Connected sockets do not
// count: they get nothing from other ports of the peer, and a resolver may have thousands.
func (e *Engine) barred(p *cone.Permission) cone.Reason {
	if e.losesTo(p, e.served) {
		return cone.ReasonLocalSocket
	}
	if !e.Model.IsSelf(p) {
		return cone.ReasonNone
	}
	return e.lacksSocket(p)
}

// lacksSocket returns ReasonNoSocket if no socket gets what p admits, a permission of the
// gateway itself.
func (e *Engine) lacksSocket(p *cone.Permission) cone.Reason {
	switch waits, err := e.Kernel.Sockets.Serves(p.Int, p.Peer); {
	case err != nil:
		e.cfg.Failed(LookForLocalSockets, 1, err, "ext", p.Ext)
		return cone.ReasonKernel
	case !waits:
		return cone.ReasonNoSocket
	}
	return cone.ReasonNone
}

// losesTo reports whether one of sockets would lose packets to p. A permission of the gateway
// itself takes none from a socket that also gets the packets at p.Int.
func (e *Engine) losesTo(p *cone.Permission, sockets Ports) bool {
	if e.Model.IsSelf(p) {
		return sockets.Takes(p.Ext, p.Int)
	}
	return sockets.Serves(p.Ext)
}

// granted tells the model that p stands by these carriers, unless a local socket gets what
// an expectation admits. It does not ask for the map, whose rule looks up sockets packet by
// packet: a short-lived socket must not cost the permission there, and the regular looks find
// one that stays.
func (e *Engine) granted(p cone.Permission, by cone.Carriers) {
	if by&cone.ByExpectation == 0 {
		e.Model.Granted(p)
		return
	}
	var served bool
	var err error
	if e.Model.IsSelf(&p) {
		served, err = e.Kernel.Sockets.Takes(p.Ext, p.Int, p.Peer)
	} else {
		served, err = e.Kernel.Sockets.Serves(p.Ext, p.Peer)
	}
	switch {
	case err != nil:
		e.cfg.Failed(LookForLocalSockets, 1, err, "ext", p.Ext)
		e.Model.Refused(e.cfg.Now(), p, cone.ReasonKernel, true)
	case served:
		e.Model.Refused(e.cfg.Now(), p, cone.ReasonLocalSocket, true)
	default:
		e.Model.Granted(p)
	}
}
