package daemon

import (
	"errors"
	"slices"
)

// HandOver makes the end of Run leave everything for the next daemon, as with on_stop
// "keep". It may be called at any time, from any goroutine.
func (d *Daemon) HandOver() { d.handsOver.Store(true) }

// holds reports whether the kernel holds something for the next daemon: standing
// permissions, or the user's revocations.
func (l *loop) holds() bool {
	return l.engine.Model.Stats().Standing > 0 || l.backends.revoked != nil && l.backends.revoked.Any()
}

// revokeAll removes every permission from the kernel. It removes the whole map first,
// so that the kernel learns nothing meanwhile.
func (d *Daemon) revokeAll() error {
	l, r := d.loop, d.reconcile
	var errs []error
	if r.backends.nft != nil {
		errs = append(errs, r.firewall.remove())
		r.backends.nft = nil
		l.useBackends(r.backends)
	}
	l.engine.Model.RevokeAll()
	l.engine.Apply(0)
	// Also delete children that came too late for their events to be read.
	_, err := dropUnanswered()
	return errors.Join(append(errs, err)...)
}

// closes notes that f closes something that New opened. Close calls these functions, the last
// one first.
func (d *Daemon) closes(f func() error) { d.closers = append(d.closers, f) }

// Close closes what New opened, and removes our tables unless permissions are to stay. Run
// calls it; call it for a Daemon that did not Run.
func (d *Daemon) Close() error {
	d.auditor.Close(!d.leave && d.loop.engine != nil)
	var errs []error
	for _, f := range slices.Backward(d.closers) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

// closeExpect closes the expect backend, if it is in use.
func (d *Daemon) closeExpect() error {
	e := d.reconcile.backends.expect
	if e == nil {
		return nil
	}
	d.leave = d.leave || e.Standing() > 0 // some expectations could not be revoked
	return e.Close()
}

// closeFirewall removes our tables unless permissions are to stay.
func (d *Daemon) closeFirewall() (err error) {
	f := d.reconcile.firewall
	if d.made && !d.leave {
		err = f.remove()
	}
	return errors.Join(err, f.close())
}

// restoreSysctls restores the settings that we changed, unless permissions stay, which need
// them.
func (d *Daemon) restoreSysctls() error {
	if d.loop.engine == nil || d.leave {
		return nil
	}
	return d.conntrack.RestoreAll()
}
