package daemon

import (
	"errors"
	"log/slog"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/episodes"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// olderTables are tables of an earlier daemon with another name, and what they hold. This
// daemon takes over the contents and removes the tables: nobody else would.
type olderTables struct {
	all      []*firewall
	standing []expect.Adopted
	revoked  []cone.Revoked       // by the user
	unsure   []elements.Direction // flows whose source may be spoofed
}

func (d *Daemon) openOlder() (o olderTables, err error) {
	l := d.loop
	o.all, err = openTables(d.given.Table)
	if err != nil { // tables that cannot be opened, such as another process's, stay
		d.reconcile.firewall.warnings.add(warnOlderTables, "", "%v", err)
	}
	var errs []error
	for _, f := range o.all {
		standing, err := f.left(l.cfg)
		o.standing = append(o.standing, standing...)
		errs = append(errs, err)
		revoked, err := f.tables.NewRevoked().Adopt()
		o.revoked = append(o.revoked, revokedKeys(revoked)...)
		errs = append(errs, err, f.tables.NewUnsure().List(func(x elements.Direction) { o.unsure = append(o.unsure, x) }))
	}
	if err := errors.Join(errs...); err != nil {
		o.close()
		return o, err
	}
	return o, nil
}

// moveTo puts into m what stands, and what was revoked. The model decides later what stays.
func (o *olderTables) moveTo(m *elements.Map, failures *episodes.Failures) error {
	ps := make([]cone.Permission, len(o.standing))
	for i, a := range o.standing {
		ps[i] = a.Permission
	}
	m.Grant(ps, func(i int, r cone.Reason, err error) {
		failures.Note(requestCarryPermissionOver, 1, because(r, err), "ext", ps[i].Ext, "peer", ps[i].Peer)
	})
	ps = ps[:0]
	for _, r := range o.revoked { // until the model denies them
		if p := (cone.Permission{Key: r.Key}); m.Carries(&p) {
			ps = append(ps, p)
		}
	}
	return m.Deny(ps, cone.ReasonRevoked)
}

// moveUnsureTo puts the flows whose source may be spoofed into the sets of t, which must
// exist unless there is no nftables.
func (o *olderTables) moveUnsureTo(t *rules.Tables) error {
	if len(o.unsure) == 0 || t == nil {
		return nil
	}
	return t.NewUnsure().Add(o.unsure)
}

func (o *olderTables) remove(log *slog.Logger) error {
	for _, f := range o.all {
		if err := f.remove(); err != nil {
			return err
		}
		log.Info("the tables of an earlier daemon are removed; the permissions that they held are in those of this one", "table", f.name)
	}
	return nil
}

// close lets go of the tables.
func (o *olderTables) close() {
	for _, f := range o.all {
		_ = f.close()
	}
}
