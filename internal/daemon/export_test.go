package daemon

import "github.com/conenatd/conenatd/internal/rules"

// WithoutNFTables lets all daemons of this process find a kernel that has no nftables.
func WithoutNFTables() {
	openRules = func(rules.Config) (*rules.Tables, error) {
		return nil, &rules.UnsupportedError{Feature: rules.FeatureTable, Fix: "it is a test"}
	}
}

// FailLinks lets the daemon find its link watcher broken, which ends it.
func (d *Daemon) FailLinks() { _ = d.links.Close() }

// FailReconcile lets each reconcile of a daemon that does not run yet fail.
func (d *Daemon) FailReconcile() {
	_ = d.reconcile.ports.Close()
	d.reconcile.looked = -betweenLooks // else the first one does not look at sockets
}

// FlowsAfter returns how many flows the model knows once the loop has caught up with the events
// of f. The loop waits for f.
func (d *Daemon) FlowsAfter(f func() error) (n int, err error) {
	d.do(func(*loop) { err = f() })
	d.catchUp()
	d.do(func(l *loop) { n = l.engine.Model.Stats().Flows })
	return n, err
}

// Descriptors is how many open files a daemon asks for.
const Descriptors = descriptors
