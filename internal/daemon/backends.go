package daemon

import (
	"errors"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/engine"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// backends are the backends in use. The engine has the same ones as its carriers: see
// useBackends.
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

// configure applies cfg to what is granted or refreshed from now on.
func (b *backends) configure(cfg config.Config) {
	b.carriers().SetLifetime(cfg.Lifetime)
	if b.nft != nil {
		b.nft.SetPeerGroups(cfg.PeerGroups)
	}
}

// useBackends lets the engine use d.backends. Call it after each change of these.
func (d *Daemon) useBackends() {
	k := d.backends.carriers()
	k.Flows, k.Sockets = d.queries, d.sockets
	d.engine.Kernel = k
}

// newEngine makes the engine of a daemon that opened everything it needs.
func (d *Daemon) newEngine(m *cone.Model) {
	d.engine = engine.New(m, engine.Kernel{}, engine.Config{
		Now:     d.now,
		Failed:  func(r engine.Request, n int, err error, args ...any) { d.failures.note(request(r), n, err, args...) },
		Took:    d.latency.record,
		Between: d.beat,
	})
	d.useBackends()
	d.engine.SetServed(d.served, d.served)
}

// because returns err, or an error that says r if err is nil.
func because(r cone.Reason, err error) error {
	if err == nil {
		err = errors.New(r.String())
	}
	return err
}
