package daemon

import (
	"errors"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// given tells which outside addresses the user's rules may give hosts with mappings. Any, if it
// is nil.
type given struct {
	rules   []userrules.SourceNAT
	own     map[string]netip.Addr // what a masquerade gives, by link
	links   []string              // the outside links
	subnets []netip.Prefix        // with mappings
	known   map[asked]bool        // answers of may
}

// asked is a question that may answers.
type asked struct {
	link       string
	host, addr cone.Addr
}

// given returns nil if the rules are not known, or while there is no outside link.
func (f *firewall) given(c *rules.MappingConfig, network gateway.Network) *given {
	links := network.OutsideLinks4()
	if len(links) == 0 || f.sources == nil || f.user == nil || f.user.SourcesMayBeHidden() {
		return nil
	}
	return &given{f.sources, f.ownAddrs, links, c.Subnets, make(map[asked]bool)}
}

// may reports whether a host may get an outside address on a link, and mayBy whether it may on
// any link.
func (g *given) may(link string, host, addr cone.Addr) bool {
	if g == nil {
		return true
	}
	q := asked{link, host, addr}
	may, ok := g.known[q]
	if !ok {
		may = userrules.MayGiveAddr(g.rules, link, []netip.Prefix{netip.PrefixFrom(host.Netip(), 32)}, addr.Netip(), g.own[link])
		g.known[q] = may
	}
	return may
}

func (g *given) mayBy(host, addr cone.Addr) bool {
	return g == nil || slices.ContainsFunc(g.links, func(link string) bool { return g.may(link, host, addr) })
}

// toSomebody reports whether some host may get an outside address on a link.
func (g *given) toSomebody(link string, addr cone.Addr) bool {
	return userrules.MayGiveAddr(g.rules, link, g.subnets, addr.Netip(), g.own[link])
}

// stray notes a mapping whose host may no longer get its outside address: a rule gives it another
// one. New flows follow the rule; the living ones keep the address. It returns false for other
// mappings.
func (m *mapper) stray(x elements.Mapping) bool {
	if !m.isFormer(x.Link, x.Int.Addr, x.Ext.Addr) {
		return false
	}
	m.strays = append(m.strays, x)
	return true
}

// isFormer reports whether the rules no longer give a host an outside address on a link. It notes
// the address if they give it on no link.
func (m *mapper) isFormer(link string, host, addr cone.Addr) bool {
	if m.given.may(link, host, addr) {
		return false
	}
	if !m.given.mayBy(host, addr) {
		m.formers[elements.Former{Host: host, Addr: addr}] = struct{}{}
	}
	return true
}

// leave ends the mappings of strays, lets living flows with a former address teach the kernel no
// mapping, and lets the kernel forget the addresses on a link if it has learned a wrong one.
func (m *mapper) leave() error {
	if m.given == nil {
		return nil
	}
	wrong := make(map[string]struct{}) // links
	errs := []error{
		m.kernel.Leave(slices.Collect(maps.Keys(m.formers))),
		m.kernel.Regain(func(f elements.Former) bool { return m.given.mayBy(f.Host, f.Addr) }),
		m.kernel.Revoke(m.strays),
		m.kernel.Taught(func(link string, host, addr cone.Addr) {
			if host == everybody && !m.given.toSomebody(link, addr) || host != everybody && !m.given.may(link, host, addr) {
				wrong[link] = struct{}{}
			}
		}),
	}
	for link := range wrong {
		errs = append(errs, m.kernel.Unteach(link))
	}
	return errors.Join(errs...)
}

// everybody stands for all hosts in what flows taught the kernel.
var everybody = cone.AddrFrom4([4]byte{})
