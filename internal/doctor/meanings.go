package doctor

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// A meaning says how bad a finding of the daemon is, why it matters and what repairs it.
type meaning struct {
	id       string
	severity Severity
	why      string
	fix      func(f *Facts, d control.Finding) ([]Line, string) // nil if there is no line
	flows    bool                                               // only a daemon that has seen flows knows
}

// set returns a fix that is a line of the configuration.
func set(in Place, line string) func(*Facts, control.Finding) ([]Line, string) {
	return func(*Facts, control.Finding) ([]Line, string) { return []Line{{in, line}}, "" }
}

// setOutside names the outside links and that of the finding, because the user may name some
// already, and the line takes the place of his. It leaves out those for IPv6 alone, which he does
// not name: a link with a name is outside for both families.
func setOutside(f *Facts, d control.Finding) ([]Line, string) {
	links := slices.DeleteFunc(slices.Clone(f.Status.Outside), func(l string) bool { return slices.Contains(f.Status.OutsideIPv6Only, l) })
	if !slices.Contains(links, d.About) {
		links = append(links, d.About)
	}
	for i, l := range links {
		links[i] = strconv.Quote(l)
	}
	return []Line{{File, "outside = [" + strings.Join(links, ", ") + "]"}}, ""
}

// run returns a fix that sets a sysctl.
func run(name, value string) func(*Facts, control.Finding) ([]Line, string) {
	return func(*Facts, control.Finding) ([]Line, string) { return []Line{sysctl(name, value)}, keepSysctl }
}

// theirs is the line that the daemon names.
func theirs(_ *Facts, d control.Finding) ([]Line, string) {
	if d.Fix == "" {
		return nil, ""
	}
	return []Line{{Shell, d.Fix}}, keepSysctl
}

// forward turns on what the kernel asks before it forwards a packet of the finding's subnet.
func forward(f *Facts, d control.Finding) ([]Line, string) {
	if strings.Contains(d.About, ":") {
		return f.forward6(), keepSysctl
	}
	return f.forward4(), keepSysctl
}

// letIn lets children of the finding's subnet pass the chain that drops them. The finding
// may be about some of the subnet's permissions, which it names after the subnet.
func letIn(f *Facts, d control.Finding) ([]Line, string) {
	subnet, _, inMap := strings.Cut(d.About, " ")
	i := slices.IndexFunc(f.Status.Subnets, func(s control.Subnet) bool { return s.Prefix.String() == subnet })
	if i < 0 {
		return nil, ""
	}
	s := f.Status.Subnets[i]
	s.Routed = s.Routed && !inMap // what the map admits is translated
	if s.Carried.Before != "" {
		return f.acceptEarly(s, inMap)
	}
	return f.accept(s.Carried.Chain, s)
}

// letOut lets what hosts of the finding's subnet send pass the chain that drops it.
func letOut(f *Facts, d control.Finding) ([]Line, string) {
	i := slices.IndexFunc(f.Status.Subnets, func(s control.Subnet) bool { return s.Prefix.String() == d.About })
	if i < 0 {
		return nil, ""
	}
	return f.acceptOut(f.Status.Subnets[i].Blocked, f.Status.Subnets[i].Prefix)
}

// outOfZone lets children of the finding's subnet in, which come in a zone without expectations:
// by the map, if it can have them.
func outOfZone(f *Facts, d control.Finding) ([]Line, string) {
	i := slices.IndexFunc(f.Status.Subnets, func(s control.Subnet) bool { return s.Prefix.String() == d.About })
	switch {
	case i < 0 || f.Status.Subnets[i].Routed || f.Status.Subnets[i].Prefix.Addr().Is6():
		return nil, ""
	case strings.Contains(f.Status.Backend, "nft"):
		return letIn(f, d)
	}
	return []Line{{File, `backend = "auto"`}}, ""
}

// translate translates the finding's subnet on all outside links.
func translate(f *Facts, d control.Finding) (lines []Line, keep string) {
	subnet, err := netip.ParsePrefix(d.About)
	if err != nil || !subnet.Addr().Is4() {
		return nil, ""
	}
	for _, link := range f.Outside4 {
		more, k := f.masquerade(subnet, link)
		lines, keep = append(lines, more...), k
	}
	return lines, keep
}

// meanings has all findings of the daemon (docs/control.md, Warnings).
var meanings = []meaning{
	{id: "no_nftables", severity: Warning, why: "expectations alone carry permissions: at most 64 peers for each outside port, and nothing limits the children of a peer"},
	{id: "feature_missing", severity: Warning, why: "the part of conenatd that needs it is off"},
	{id: "older_tables_unread", severity: Warning, why: "permissions of the earlier daemon are not taken over"},
	{id: "forwards_unread", severity: Warning, why: "an expectation could take packets that you forward, so none is made where one may be"},
	{id: "forward_not_understood", severity: Warning, why: "where the rule may match, the map alone carries permissions"},
	{id: "all_ports_forwarded", severity: Error, why: "a forward comes before the map: what the rule matches reaches its host, whatever was permitted"},
	{id: "chain_before_mapping", severity: Error, why: "of two source NAT rules the first one wins: hosts do not keep one outside port"},
	{id: "ports_chosen_by_rule", severity: Warning, why: "two hosts may get the same outside port", fix: set(File, `port_pool = "none"`)},
	{id: "address_not_by_host", severity: Warning, why: "what this rule translates to another address may leave with the address of the host's mapping"},
	{id: "source_nat_unread", severity: Warning, why: "hosts may get outside ports that a rule of yours gives to others"},
	{id: "source_nat_hidden", severity: Warning, why: "hosts may get outside ports that a rule of yours gives to others", fix: set(File, `port_pool = "none"`)},
	{id: "pool_overlaps_local_ports", severity: Error, why: "hosts and the gateway's own connections would get the same ports", fix: theirs},
	{id: "pool_moved", severity: Warning, why: "hosts and the gateway's own connections would get the same ports", fix: theirs},
	{id: "pool_ports_served", severity: Note, why: "hosts have fewer ports to choose from"},
	{id: "pool_ports_forwarded", severity: Note, why: "hosts have fewer ports to choose from"},
	{id: "pool_used_up", severity: Warning, why: "some hosts have an outside port for each peer, as behind a symmetric NAT", flows: true},
	{id: "forward_chains_unread", severity: Warning, why: "conenatd learns only from lost packets what your firewall drops"},
	{id: "children_dropped", severity: Error, why: "what a peer sends from another port is lost, although it is permitted", fix: letIn},
	{id: "hosts_blocked", severity: Error, why: "no UDP flow begins, so no permission arises", fix: letOut},
	{id: "networks_left_out", severity: Note, why: "hosts of these networks are not served"},
	{id: "hosts_kept_in", severity: Note, why: "no UDP flow begins, so no permission arises"},
	{id: "packets_in_zone", severity: Error, why: "what a peer sends from another port is lost, although it is permitted", fix: outOfZone, flows: true},
	{id: "no_carrier", severity: Error, why: "nothing gets in that these flows would permit", fix: set(File, `backend = "auto"`)},
	{id: "second_zone", severity: Error, why: "the second pass drops what a permission admitted in the first", fix: set(Subnets, "routed = true"), flows: true},
	{id: "zone_of_both", severity: Error, why: "no packet from outside is admitted to hosts in a zone of both directions", flows: true},
	{id: "several_zones", severity: Error, why: "hosts of two networks with the same addresses cannot be told apart", flows: true},
	{id: "way_back_unknown", severity: Warning, why: "what these hosts send earns no permission, so no other port of the peer gets in", flows: true},
	{id: "changes_late", severity: Note, why: "a new forward or address takes effect seconds later", flows: true},
	{id: "backend_missing", severity: Warning, why: "permissions that only this backend can carry are refused"},
	{
		id: "port_per_peer", severity: Warning, why: "programs conclude that they are behind a symmetric NAT, and peers cannot reach them",
		fix: set(Subnets, `mapping = "endpoint_independent"`), flows: true,
	},
	{id: "large_peer_groups", severity: Warning, why: "hosts behind source NAT get permissions for single peers only", fix: set(File, `backend = "auto"`)},
	{id: "mapping_not_supported", severity: Error, why: "hosts do not keep one outside port"},
	{id: "flows_not_mapped", severity: Warning, why: "hosts do not keep one outside port", flows: true},
	{id: "label_taken", severity: Warning, why: "conenatd cannot tell what its map admits from what your rules forward to the same endpoint", flows: true},
	{id: "events_off", severity: Error, why: "a peer's first packets are lost, for up to half a minute", fix: run("net/netfilter/nf_conntrack_events", "1")},
	{
		id: "accounting_off", severity: Warning, why: "a peer that goes on sending keeps its permission, although the host is silent",
		fix: run("net/netfilter/nf_conntrack_acct", "1"),
	},
	{id: "forwarding_off", severity: Error, why: "neither hosts nor their peers get through", fix: forward},
	{id: "outside_link_missing", severity: Error, why: "permissions hold on outside links only"},
	{id: "no_inside_network", severity: Error, why: "no host is served"},
	{id: "no_outside_link", severity: Error, why: "permissions hold on outside links only"},
	{id: "conntrack_nearly_full", severity: Warning, why: "permissions that the map cannot carry are refused", fix: moreEntries, flows: true},
	{id: "inside_link_missing", severity: Warning, why: "hosts behind it are not served"},
	{id: "link_assumed_outside", severity: Note, why: "an assumption may be wrong: say what it is", fix: setOutside},
	{id: "one_link_to_both_sides", severity: Note, why: "hosts on that link can fake the address of a peer"},
	{id: "default_route_inside", severity: Note, why: "peers behind this link get no permission"},
	{id: "subnet_link_empty", severity: Error, why: "no host of the subnet is served"},
	{id: "subnet_is_own_address", severity: Error, why: "no host is served"},
	{id: "subnet_on_no_link", severity: Error, why: "no host of the subnet is served"},
	{id: "link_down", severity: Error, why: "hosts reach nobody by a link that does not run"},
	{id: "inside_link_down", severity: Note, why: "no host is there, or none can be reached"},
	{id: "peers_behind_link", severity: Warning, why: "peers behind this link get no permission", fix: setOutside, flows: true},
	{id: "peers_by_other_link", severity: Warning, why: "what a peer sends from another port is lost, although it is permitted", fix: setOutside, flows: true},
	{id: "no_source_nat", severity: Error, why: "nobody on the Internet can answer a private address, and no permission arises", fix: translate},
	{id: "broken_flows", severity: Warning, why: "nobody can answer these flows, and they live for as long as the host sends", fix: set(File, "heal_flows = true"), flows: true},
	{id: "filtering_not_open", severity: Error, why: "strangers cannot send to hosts that you opened to them"},
	{id: "subnet_open", severity: Note, why: "you chose it; only the firewall of each host protects its ports"},
	{id: "self_not_served", severity: Error, why: "peers of the gateway's own programs may answer from one port only"},
	{id: "ipv6_not_routed", severity: Warning, why: "IPv6 is seldom translated, and other flows give no permission", fix: set(Subnets, "routed = true")},
}

// moreEntries doubles the conntrack table.
func moreEntries(f *Facts, _ control.Finding) ([]Line, string) {
	const name = "net/netfilter/nf_conntrack_max"
	if s := f.Sysctls[name]; !s.Writable && !s.ByRoot {
		return nil, "" // the setting belongs to the host of this container
	}
	return []Line{sysctl(name, fmt.Sprint(2*f.Status.Conntrack.Max))}, keepSysctl
}

// meaningOf returns what a finding of the daemon means; nil if it is of a newer daemon.
func meaningOf(d control.Finding) *meaning {
	if i := slices.IndexFunc(meanings, func(m meaning) bool { return m.id == d.ID }); i >= 0 {
		return &meanings[i]
	}
	return nil
}

// explain adds to a finding of the daemon what it means.
func (f *Facts) explain(d control.Finding) Finding {
	x := Finding{ID: d.ID, About: d.About, Severity: Warning, What: d.Text}
	m := meaningOf(d)
	if m == nil {
		return x
	}
	if x.Severity, x.Why = m.severity, m.why; m.fix != nil {
		x.Fix, x.Keep = m.fix(f, d)
	}
	return x
}
