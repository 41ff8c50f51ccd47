package daemon

import (
	"errors"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/handover"
)

// Cleaned counts what Cleanup took out of the kernel.
type Cleaned struct {
	expect.Cleaned
	Elements int      // of the map of permissions
	Children int      // unanswered children
	Tables   []string // names of our nftables tables
}

// Cleanup removes every trace of a dead daemon from the kernel, whatever its configuration
// was, in the network namespace of this process. It refuses while a daemon runs
// (control.RunningError).
func Cleanup() (n Cleaned, err error) {
	lock, err := control.Acquire("")
	if err != nil {
		return n, err
	}
	defer lock.Close()
	conntrack, err := handover.Open()
	if err != nil {
		return n, err
	}
	var errs []error
	if n.Cleaned, err = expect.Cleanup(0); err != nil {
		errs = append(errs, err)
	}
	n.Tables, n.Elements, err = dropTables()
	errs = append(errs, err)
	if n.Children, err = dropUnanswered(); err != nil {
		errs = append(errs, err)
	}
	return n, errors.Join(append(errs, conntrack.RestoreAll(), conntrack.Notes.WriteRevoked(nil), conntrack.Notes.WriteUnsure(nil, nil), control.Sweep())...)
}

// dropTables removes our nftables tables. It returns their names and how many permissions
// their maps held.
func dropTables() (names []string, elements int, err error) {
	all, err := openTables("")
	errs := []error{err}
	for _, f := range all {
		left, err := f.left(config.Default())
		elements += len(left)
		if err = errors.Join(err, f.remove()); err == nil {
			names = append(names, f.name)
		}
		errs = append(errs, err, f.close())
	}
	return names, elements, errors.Join(errs...)
}

// openTables opens our nftables tables except those with the name but. Even with an error
// it returns the tables that it could open.
func openTables(but string) (all []*firewall, err error) {
	names, err := Leftovers()
	errs := []error{err}
	for _, name := range names {
		if name == but {
			continue
		}
		f, err := openFirewall(name)
		errs = append(errs, err)
		if err == nil && f.tables != nil {
			all = append(all, f)
		}
	}
	return all, errors.Join(errs...)
}

// dropUnanswered deletes all children of ours that no inside host answered: they would
// live for as long as their peer keeps sending.
func dropUnanswered() (int, error) {
	return flows.DeleteIf(func(f *cone.Flow) bool { return f.IsChild() && !f.Status.Has(cone.StatusSeenReply) })
}
