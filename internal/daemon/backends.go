package daemon

import (
	"errors"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// backends are the backends in use. The reconcile opens and closes them; the loop, and the
// engine, get them by useBackends.
type backends struct {
	expect  *expect.Backend   // nil where it is not used
	nft     *elements.Map     // nil where it is not used
	revoked *elements.Revoked // what the user revoked; nil without nftables
}

// carriers returns the backends as the engine sees them.
func (b *backends) carriers() (k engine.Kernel) {
	if b.expect != nil {
		k.Expectations = b.expect
	}
	if b.nft != nil {
		k.Map = b.nft
	}
	if b.revoked != nil {
		k.Revoked = b.revoked
	}
	return k
}

// String names the backends in use.
func (b *backends) String() string { return b.carriers().Carriers().String() }

// Max is how many permissions may stand.
func (b *backends) Max() int { return b.carriers().Max() }

// configure applies cfg to what is granted or renewed from now on.
func (b *backends) configure(cfg config.Config) {
	b.carriers().SetLifetime(cfg.Lifetime)
	if b.nft != nil {
		b.nft.SetPeerGroups(cfg.PeerGroups)
	}
}

// useBackends lets the loop and its engine use b.
func (l *loop) useBackends(b backends) {
	l.backends = b
	if l.engine != nil {
		k := b.carriers()
		k.Flows, k.Sockets = l.queries, l.sockets
		l.engine.Kernel = k
	}
}

// newEngine makes the engine, once everything that it needs is open. sockets are those that
// the first look found.
func (l *loop) newEngine(m *cone.Model, sockets engine.Ports) {
	l.engine = engine.New(m, engine.Kernel{}, engine.Config{
		Now: l.now,
		Failed: func(r engine.Request, n int, err error, args ...any) {
			l.failures.Note(episodes.Request(r), n, err, args...)
		},
		Took:    l.latency.Record,
		Between: l.beat,
	})
	l.useBackends(l.backends)
	l.engine.SetServed(sockets, sockets)
}

// because returns err, or an error that says r if err is nil.
func because(r cone.Reason, err error) error {
	if err == nil {
		err = errors.New(r.String())
	}
	return err
}
