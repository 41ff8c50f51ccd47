package mapping

import (
	"errors"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Given tells which outside addresses the user's rules may give hosts with mappings. Any, if it
// is nil.
type Given struct {
	rules   []userrules.SourceNAT
	own     map[string]netip.Addr // what a masquerade gives, by link
	links   []string              // the outside links
	subnets []netip.Prefix        // with mappings
	lost    func(cone.Addr) bool
	known   map[asked]bool // answers of may
}

// asked is a question that may answers.
type asked struct {
	link       string
	host, addr cone.Addr
}

// NewGiven returns what rules give the hosts of subnets on the outside links. own is what a
// masquerade gives, by link. lost reports whether the gateway lost an address: a host may get it only
// where a rule names it for what the host sends to most destinations.
func NewGiven(
	rules []userrules.SourceNAT, own map[string]netip.Addr, links []string, subnets []netip.Prefix, lost func(cone.Addr) bool,
) *Given {
	return &Given{rules, own, links, subnets, lost, make(map[asked]bool)}
}

// may reports whether a host may get an outside address on a link, and mayBy whether it may on
// any link.
func (g *Given) may(link string, host, addr cone.Addr) bool {
	if g == nil {
		return true
	}
	q := asked{link, host, addr}
	may, ok := g.known[q]
	if !ok {
		may = g.mayGive(link, []netip.Prefix{netip.PrefixFrom(host.Netip(), 32)}, addr)
		g.known[q] = may
	}
	return may
}

func (g *Given) mayBy(host, addr cone.Addr) bool {
	return g == nil || slices.ContainsFunc(g.links, func(link string) bool { return g.may(link, host, addr) })
}

// toSomebody reports whether some host may get an outside address on a link.
func (g *Given) toSomebody(link string, addr cone.Addr) bool {
	return g.mayGive(link, g.subnets, addr)
}

func (g *Given) mayGive(link string, hosts []netip.Prefix, addr cone.Addr) bool {
	if g.lost(addr) {
		return userrules.MayName(g.rules, hosts, addr.Netip())
	}
	return userrules.MayGiveAddr(g.rules, link, hosts, addr.Netip(), g.own[link])
}

// Named reports whether a rule may name an address for some host with mappings, so that it is not
// lost for all of them if no link has it.
func (g *Given) Named(addr netip.Addr) bool { return userrules.MayName(g.rules, g.subnets, addr) }

// Former reports whether an address is lost, and a host's mapping on it ends therefore. It returns
// false if g is nil.
func (g *Given) Former(host, addr cone.Addr) bool {
	return g != nil && g.lost(addr) && !g.mayBy(host, addr)
}

// EndFormer ends the mappings whose hosts the rules no longer give their outside address.
func (g *Given) EndFormer(kernel *elements.Mappings) error {
	m := newMapper(View{Kernel: kernel, Given: g})
	err := kernel.List(func(x elements.Mapping, _ time.Duration) { m.stray(x) })
	return errors.Join(err, m.leave())
}

// stray notes a mapping whose host may no longer get its outside address: a rule gives it another
// one. New flows follow the rule; the living ones keep the address. It returns false for other
// mappings.
func (m *Mapper) stray(x elements.Mapping) bool {
	if !m.isFormer(x.Link, x.Int.Addr, x.Ext.Addr) {
		return false
	}
	m.strays = append(m.strays, x)
	return true
}

// isFormer reports whether the rules no longer give a host an outside address on a link. It notes
// the address if they give it on no link.
func (m *Mapper) isFormer(link string, host, addr cone.Addr) bool {
	if m.Given.may(link, host, addr) {
		return false
	}
	if !m.Given.mayBy(host, addr) {
		m.formers[elements.Former{Host: host, Addr: addr}] = struct{}{}
	}
	return true
}

// Move makes links take over mappings. to returns the link for a mapping, or its own to leave it there.
// None moves to a link on which the rules do not give its host the outside address.
func (g *Given) Move(kernel *elements.Mappings, to func(elements.Mapping) string) error {
	var moves []elements.Move
	err := kernel.List(func(x elements.Mapping, _ time.Duration) {
		link := to(x)
		if link == x.Link {
			return
		}
		host := []netip.Prefix{netip.PrefixFrom(x.Int.Addr.Netip(), 32)}
		if userrules.GivesAddr(g.rules, link, host, x.Ext.Addr.Netip(), g.own[link]) {
			moves = append(moves, elements.Move{Mapping: x, To: link})
		}
	})
	return errors.Join(err, kernel.Move(moves))
}

// leave ends the mappings of strays, lets living flows with a former address teach the kernel no
// mapping, and lets the kernel forget the addresses on a link if it has learned a wrong one.
func (m *Mapper) leave() error {
	if m.Given == nil {
		return nil
	}
	wrong := make(map[string]struct{}) // links
	errs := []error{
		m.Kernel.Leave(slices.Collect(maps.Keys(m.formers))),
		m.Kernel.Regain(func(f elements.Former) bool { return m.Given.mayBy(f.Host, f.Addr) }),
		m.Kernel.RevokeLost(m.strays),
		m.Kernel.Taught(func(link string, host, addr cone.Addr) {
			if host == everybody && !m.Given.toSomebody(link, addr) || host != everybody && !m.Given.may(link, host, addr) {
				wrong[link] = struct{}{}
			}
		}),
	}
	for link := range wrong {
		errs = append(errs, m.Kernel.Unteach(link))
	}
	return errors.Join(errs...)
}

// everybody stands for all hosts in what flows taught the kernel.
var everybody = cone.AddrFrom4([4]byte{})
