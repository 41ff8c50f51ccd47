package daemon

import "github.com/conenatd/conenatd/internal/rules/elements"

// noteUnsure tells the next daemon which flows have a source that may be spoofed, before the
// tables are removed.
func (d *Daemon) noteUnsure() error {
	var flows []elements.Direction
	if t := d.reconcile.firewall.tables; t != nil {
		if err := t.NewUnsure().List(func(x elements.Direction) { flows = append(flows, x) }); err != nil {
			return err
		}
	}
	return d.conntrack.Notes.WriteUnsure(d.loop.cfg.Inside, flows)
}
