package daemon

import "github.com/conenatd/conenatd/internal/rules"

// WithoutNFTables lets all daemons of this process find a kernel that has no nftables.
func WithoutNFTables() {
	openRules = func(rules.Config) (*rules.Tables, error) {
		return nil, &rules.UnsupportedError{Feature: rules.FeatureTable, Mend: "it is a test"}
	}
}

// FailLinks lets the daemon find its link watcher broken, which ends it.
func (d *Daemon) FailLinks() { _ = d.links.Close() }

// FailReconcile lets each reconcile of a daemon that does not run yet fail.
func (d *Daemon) FailReconcile() {
	_ = d.reconcile.ports.Close()
	d.reconcile.looked = -betweenLooks // else the first one does not look at sockets
}
