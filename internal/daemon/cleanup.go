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
	inMap, err := dropTables(table)
	n.Elements = len(inMap)
	errs = append(errs, err)
	if n.Children, err = dropUnanswered(inMap); err != nil {
		errs = append(errs, err)
	}
	return n, errors.Join(append(errs, settings(socket).restore())...)
}

// dropTables removes our nftables tables and returns what the map held.
func dropTables(name string) (map[cone.Key]standing, error) {
	f, err := openFirewall(name)
	if err != nil || f.tables == nil {
		return nil, err
	}
	left, err := f.left(config.Default())
	inMap := make(map[cone.Key]standing)
	for _, a := range left {
		inMap[a.Key] = standing{in: a.Int}
	}
	return inMap, errors.Join(err, f.remove(), f.close())
}

// settings are the sysctls of the daemon with this control socket.
func settings(socket string) sysctls {
	return sysctls{dir: sysctlDir, note: strings.TrimSuffix(socket, ".sock") + ".sysctl"}
}

// dropUnanswered deletes all children of ours that no inside host answered:
// they would live for as long as their peer keeps sending. Those that the map
// admitted are known by what it held.
func dropUnanswered(inMap map[cone.Key]standing) (n int, err error) {
	q, err := ctwatch.DialQueries(ctwatch.Config{})
	if err != nil {
		return 0, err
	}
	defer q.Close()
	wild := make(map[uint8]struct{})
	for k := range inMap {
		wild[k.Wild] = struct{}{}
	}
	var children []cone.Flow
	err = q.Dump(func(f *cone.Flow) {
		admitted := f.Status.Has(cone.StatusExpected) && cone.IsAnchor(f.MasterSrc, f.MasterDst)
		if f.Status.Has(cone.StatusDstNAT) && !f.Status.Has(cone.StatusExpected) {
			for w := range wild {
				s, ok := inMap[cone.Key{Ext: f.Dst, Peer: f.Src.Addr.WithoutLow(w), Wild: w, Zone: f.OrigZone}]
				admitted = admitted || ok && s.in == f.ReplySrc
			}
		}
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
