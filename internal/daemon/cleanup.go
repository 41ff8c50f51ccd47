package daemon

import (
	"errors"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/expect"
)

// Cleaned counts what Cleanup took out of the kernel.
type Cleaned struct {
	expect.Cleaned
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
	if n.Children, err = dropUnanswered(); err != nil {
		errs = append(errs, err)
	}
	errs = append(errs, settings(socket).restore(), dropTable(table))
	return n, errors.Join(errs...)
}

// dropTable removes our nftables table.
func dropTable(name string) error {
	f, err := openFirewall(name)
	if err != nil {
		return err
	}
	return f.close(false)
}

// settings are the sysctls of the daemon with this control socket.
func settings(socket string) sysctls {
	return sysctls{dir: sysctlDir, note: strings.TrimSuffix(socket, ".sock") + ".sysctl"}
}

// dropUnanswered deletes all children of ours that no inside host answered:
// they would live for as long as their peer keeps sending.
func dropUnanswered() (n int, err error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	var children []cone.Flow
	err = q.Dump(func(f *cone.Flow) {
		if f.Status.Has(cone.StatusExpected) && !f.Status.Has(cone.StatusSeenReply) &&
			cone.IsAnchor(f.MasterSrc, f.MasterDst) {
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
