package daemon

import (
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
)

// self reports for which families the gateway's own programs get permissions. Only
// expectations carry them. Linux drops IPv4 packets that come in with an address of the
// gateway as their source; for IPv6 a rule of ours has to do so, or a host could gain a
// permission in the gateway's name.
func (l *loop) self(cfg config.Config) (ipv4, ipv6 bool) {
	if !cfg.Self || l.backends.expect == nil || !wantsExpect(cfg) {
		return false, false
	}
	v4, v6 := l.backends.expect.Helpers()
	return v4 != "", v6 != "" && l.features.knowsOwn()
}

// ownAddresses returns the gateway's addresses if its own programs may get permissions.
func (r *reconciler) ownAddresses(cfg config.Config) (all []netip.Prefix) {
	if !cfg.Self {
		return nil
	}
	for _, a := range r.network.Topology().Local {
		all = append(all, netip.PrefixFrom(a, a.BitLen()))
	}
	return all
}

// hearSelf returns a function to call once d.network is updated. If the gateway's addresses
// changed, that function lets events of their flows pass; it reports whether they changed.
func (r *reconciler) hearSelf(cfg config.Config) func() (moved bool) {
	old := r.ownAddresses(cfg)
	return func() (moved bool) {
		if slices.Equal(old, r.ownAddresses(cfg)) {
			return false
		}
		r.failures.Note(requestFilterConntrackEvents, 1, r.filterEvents(cfg))
		return true
	}
}

// warnSelf warns if the gateway's own programs get no permissions for a family.
func (l *loop) warnSelf(out *warnings) {
	if !l.cfg.Self {
		return
	}
	switch ipv4, ipv6 := l.self(l.cfg); {
	case !ipv4:
		out.add(warnSelf, "", "self = true has no effect: the gateway's own programs get permissions by expectations alone, "+
			"and the expect backend is missing")
	case !ipv6 && !l.features.knowsOwn():
		out.add(warnSelf, "IPv6", "self = true is for IPv4 alone: without nftables and its module nft_fib_inet "+
			"a host could send with an IPv6 address of the gateway, and earn a permission for it")
	case !ipv6:
		out.add(warnSelf, "IPv6", "self = true is for IPv4 alone: the kernel has no conntrack helper for IPv6 "+
			"(nfnetlink_cthelper, nf_conntrack_h323 or nf_conntrack_tftp)")
	}
}
