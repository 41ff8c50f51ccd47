package daemon

import (
	"fmt"
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/handover"
)

// helped is what the daemon read of the hosts between which helpers of the user's work.
type helped struct {
	read  bool   // since the tables were made
	pairs uint64 // count then
}

// autoHelpers is the setting of kernels before 6.0 by which they give flows helpers without any
// rule.
const autoHelpers = "nf_conntrack_helper"

// readAutoHelpers reports whether the kernel gives flows helpers by itself.
func readAutoHelpers() bool {
	n, err := handover.Read(autoHelpers)
	return err == nil && n != 0
}

// mayHelp reports whether flows may get a conntrack helper that matters, by rules or, if auto is
// set, by the kernel itself. The rules for flows of the gateway itself are not read.
func (f *firewall) mayHelp(cfg config.Config, auto bool) bool {
	return f.withExpectations() && (auto || cfg.Self || f.unread != nil || f.user == nil || f.user.GivesHelpers())
}

// helpersChanged reports whether the tables must change for the rules that give flows helpers.
func (f *firewall) helpersChanged(cfg config.Config) bool {
	auto := readAutoHelpers()
	return f.last != nil && (f.mayHelp(cfg, auto) != f.last.Helped || (f.withExpectations() && auto) != f.last.AutoHelpers)
}

// lookForHelpers lets no expectation stand between hosts for which the kernel saw a helper of the
// user's at work since the last look. The helper may have dropped the packet because of one: it
// drops what is sent again, too, while the expectation stands.
func (r *reconciler) lookForHelpers() error {
	f := r.firewall
	if f.tables == nil || f.last == nil || !f.last.Helped {
		return nil
	}
	n, err := f.tables.HelpedPairs()
	if err != nil || f.helped.read && n == f.helped.pairs {
		return err
	}
	type flow struct {
		opener, answerer cone.Addr
		ext              cone.Endpoint
	}
	var all []flow
	if err := f.tables.Helped(func(opener, answerer netip.Addr, ext netip.AddrPort) {
		all = append(all, flow{cone.AddrFrom(opener), cone.AddrFrom(answerer), cone.EndpointFrom(ext)})
	}); err != nil {
		return fmt.Errorf("list hosts with helpers: %w", err)
	}
	if !r.ask(func(l *loop) {
		now := r.now()
		for _, f := range all {
			l.engine.Model.SeeHelped(now, f.opener, f.answerer, f.ext)
		}
	}) {
		return errEnded
	}
	f.helped = helped{true, n}
	return nil
}
