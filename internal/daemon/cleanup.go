package daemon

import (
	"errors"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/expect"
)

// Cleaned counts what Cleanup took out of the kernel.
type Cleaned struct {
	expect.Cleaned
	Elements int // of the map of permissions
	Children int // unanswered children
}

// Cleanup takes every trace of a dead daemon out of the kernel, in the network
// namespace of this process. It refuses while a daemon runs
// (control.RunningError).
func Cleanup(socket, table string) (Cleaned, error) {
	var n Cleaned
	lock, err := control.Acquire()
	if err != nil {
		return n, err
	}
	defer lock.Close()
	var errs []error
	if n.Cleaned, err = expect.Cleanup(0); err != nil {
		errs = append(errs, err)
	}
	n.Elements, err = dropTables(table)
	errs = append(errs, err)
	if n.Children, err = dropUnanswered(); err != nil {
		errs = append(errs, err)
	}
	return n, errors.Join(append(errs, settings(socket).restore())...)
}

// dropTables removes our nftables tables and returns how many permissions the map held.
func dropTables(name string) (elements int, err error) {
	f, err := openFirewall(name)
	if err != nil || f.tables == nil {
		return 0, err
	}
	left, err := f.left(config.Default())
	return len(left), errors.Join(err, f.remove(), f.close())
}

// settings are the sysctls of the daemon with this control socket.
func settings(socket string) sysctls {
	return sysctls{dir: sysctlDir, note: strings.TrimSuffix(socket, ".sock") + ".sysctl"}
}

// dropUnanswered deletes all children of ours that no inside host answered: they would
// live for as long as their peer keeps sending.
func dropUnanswered() (n int, err error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	var children []cone.Flow
	err = q.Dump(func(f *cone.Flow) {
		admitted := f.Labelled && f.Status.Has(cone.StatusDstNAT) ||
			f.Status.Has(cone.StatusExpected) && cone.IsAnchor(f.MasterSrc, f.MasterDst)
		if admitted && !f.Status.Has(cone.StatusSeenReply) {
			children = append(children, *f)
		}
	})
	errs := []error{err}
	for _, f := range children {
		deleted, err := q.Delete(f.Src, f.Dst, f.OrigZone, f.ID)
		if deleted {
			n++
		}
		errs = append(errs, err)
	}
	return n, errors.Join(errs...)
}
