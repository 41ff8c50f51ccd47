package doctor

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// A check finds what no warning of the daemon tells.
type check struct {
	id       string
	severity Severity
	why      string
	rules    bool // it needs the user's rules
	lines    bool // it may have lines that repair it
	find     func(f *Facts) []Finding
}

// checks has all of them (docs/doctor.md).
var checks = []check{
	{"would_not_start", Error, "nothing is served", false, true, (*Facts).wouldNotStart},
	{"no_subnet", Error, "only subnets that you enable are served", false, true, (*Facts).noSubnet},
	{"not_running", Error, "nothing is served", false, true, (*Facts).notRunning},
	{"tables_left", Warning, "these tables go on dropping packets, and nobody renews what they permit", false, true, (*Facts).tablesLeft},
	{"subnet_not_translated", Error, "nobody on the Internet can answer a private address, and no permission arises", true, true, (*Facts).notTranslated},
	{"source_nat_random", Warning, "each peer sees another outside port, as behind a symmetric NAT", true, true, (*Facts).randomPorts},
	{"udp_not_tracked", Warning, "what conntrack does not see is not translated and earns no permission", true, true, (*Facts).notTracked},
	{"timeouts_short", Warning, "RFC 4787 (REQ-5) asks for two minutes at least: hosts that keep silent for longer lose their outside port", false, true, (*Facts).shortTimeouts},
	{"reverse_path_strict", Warning, "the kernel drops what comes by an uplink other than the one that it would use for the answer", false, true, (*Facts).strictPaths},
	{"uplink_per_flow", Warning, "what a host answers to another port of a peer may leave by another uplink, with an address that its provider drops", false, true, (*Facts).uplinkPerFlow},
	{"conntrack_filling", Warning, "a full table drops new connections, of everybody", false, true, (*Facts).fillingUp},
	{"expectations_few", Note, "permissions that the map cannot carry are refused beyond that number", false, true, (*Facts).fewExpectations},
	{"rules_saved_with_tables", Warning, "while conenatd runs, Linux 6.9 and later refuse the whole file, with all changes of yours", false, true, (*Facts).savedTables},
	{"flowtable", Note, "a flow in a flowtable counts as alive for 30 seconds after its last packet, whichever side sent it", false, false, (*Facts).flowtable},
}

func (f *Facts) wouldNotStart() []Finding {
	if f.NoStart == "" {
		return nil
	}
	x := Finding{What: "conenatd would not start: " + f.NoStart}
	if f.StartFix != "" {
		x.Fix, x.Keep = []Line{{Shell, f.StartFix}}, keepSysctl
	}
	return []Finding{x}
}

func (f *Facts) noSubnet() []Finding {
	if !f.Proposed {
		return nil
	}
	if len(f.Status.Subnets) == 0 {
		what := "no subnet is enabled, and none looks like an inside network: name one with --subnet or in a [[subnet]]"
		if len(f.PassedOver) > 0 {
			what += "; left out: " + strings.Join(f.PassedOver, "; ")
		}
		return []Finding{{What: what}}
	}
	x := Finding{What: "no subnet is enabled; the rest of this report takes " + control.Joined(control.Prefixes(f.Status.Subnets), ", ") + " for enabled"}
	if f.Start != "" {
		x.Fix = []Line{{Shell, f.Start}}
		return []Finding{x}
	}
	line := "conenatd run"
	for _, s := range f.Status.Subnets {
		line += " --subnet " + s.Prefix.String()
	}
	x.Fix, x.Keep = []Line{{Shell, line}}, "write a [[subnet]] for each into /etc/conenatd/conenatd.toml"
	return []Finding{x}
}

// notRunning looks at the service of a package alone: of other daemons nobody knows whether they
// are meant to run.
func (f *Facts) notRunning() []Finding {
	if f.Running || f.Proposed || f.Start == "" || f.NoStart != "" {
		return nil
	}
	return []Finding{{What: "the installed service does not run", Fix: []Line{{Shell, f.Start}}}}
}

func (f *Facts) tablesLeft() []Finding {
	if f.Running || len(f.Left) == 0 {
		return nil
	}
	return []Finding{{
		What: "no daemon runs, and its nftables tables are still there: " + strings.Join(f.Left, ", ") + "; a new start takes them over",
		Fix:  []Line{{Shell, "conenatd cleanup"}},
	}}
}

// forward4 lets the kernel forward IPv4: by the setting of each link by which packets come in
// (IN_DEV_FORWARD).
func (f *Facts) forward4() (fix []Line) {
	for _, link := range slices.Concat(f.Outside4, f.Inside) {
		name := "net/ipv4/conf/" + link + "/forwarding"
		if n, ok := f.Sysctls.number(name); ok && n == 0 {
			fix = append(fix, sysctl(name, "1"))
		}
	}
	const all = "net/ipv4/ip_forward"
	if whole, known := f.Sysctls.number(all); known && whole == 0 {
		fix = []Line{sysctl(all, "1")} // sets all links
	}
	return fix
}

// forward6 lets the kernel forward IPv6. A gateway that forwards accepts router advertisements,
// and with them its default route, only from links with accept_ra = 2.
func (f *Facts) forward6() (fix []Line) {
	for _, link := range f.Status.Outside {
		name := "net/ipv6/conf/" + link + "/accept_ra"
		if n, ok := f.Sysctls.number(name); ok && n == 1 {
			fix = append(fix, sysctl(name, "2"))
		}
	}
	return append(fix, sysctl("net/ipv6/conf/all/forwarding", "1"))
}

func (f *Facts) notTranslated() (all []Finding) {
	for _, t := range f.Rules.Untranslated {
		if slices.ContainsFunc(f.Status.Findings, func(d control.Finding) bool { return d.ID == "no_source_nat" && d.About == t.Subnet.String() }) {
			continue // the daemon saw it
		}
		lines, keep := f.masquerade(t.Subnet, t.Link)
		all = append(all, Finding{
			About: fmt.Sprintf("%v %s", t.Subnet, t.Link), Fix: lines, Keep: keep,
			What: fmt.Sprintf("no rule of yours translates %v on %s: let one masquerade it, or set routed = true if the subnet has public addresses", t.Subnet, t.Link),
		})
	}
	return all
}

func (f *Facts) randomPorts() (all []Finding) {
	for _, t := range f.Rules.Random {
		all = append(all, Finding{
			About: fmt.Sprintf("%v %s", t.Subnet, t.Link),
			What:  fmt.Sprintf("a rule of yours chooses a random outside port for each flow of %v on %s: %s; take 'random' and 'fully-random' out of it, or keep one port for each host", t.Subnet, t.Link, t.Rule),
			Fix:   []Line{{Subnets, `mapping = "endpoint_independent"`}},
		})
	}
	return all
}

// notTracked has one finding for each rule. Rules of iptables-legacy that only numbers name come first, and
// of one chain the last one: a number changes once a rule in front of it is deleted.
func (f *Facts) notTracked() (all []Finding) {
	kept, specs := map[string][]string{}, map[string][]string{} // from conntrack, by rule
	for _, u := range f.Rules.Untracked {
		kept[u.Rule] = append(kept[u.Rule], u.packets())
		specs[u.Rule] = u.Spec
	}
	order := func(a, b string) int {
		return cmp.Or(cmp.Compare(min(len(specs[a]), 1), min(len(specs[b]), 1)), lastFirst(a, b))
	}
	for _, rule := range slices.SortedFunc(maps.Keys(kept), order) {
		x := Finding{
			About: rule,
			What:  fmt.Sprintf("a rule of yours keeps %s from conntrack: %s", strings.Join(kept[rule], ", and "), rule),
			Keep:  "take notrack out where these rules come from, or narrow the rule to packets that the gateway need not translate",
		}
		if line, ok := deleteRule(rule, specs[rule]); ok {
			x.Fix = []Line{line}
		}
		all = append(all, x)
	}
	return all
}

func (f *Facts) shortTimeouts() []Finding {
	x := Finding{Keep: keepSysctl}
	var what []string
	for _, t := range []struct {
		name  string
		least int
	}{{"net/netfilter/nf_conntrack_udp_timeout", 30}, {"net/netfilter/nf_conntrack_udp_timeout_stream", 120}} {
		if n, ok := f.Sysctls.number(t.name); ok && n < t.least {
			what = append(what, fmt.Sprintf("%s is %d seconds", t.name[strings.LastIndexByte(t.name, '/')+1:], n))
			x.Fix = append(x.Fix, sysctl(t.name, fmt.Sprint(t.least)))
		}
	}
	if len(what) == 0 {
		return nil
	}
	x.What = strings.Join(what, ", and ") + ": flows end earlier than by the kernel's own default"
	return []Finding{x}
}

func (f *Facts) strictPaths() []Finding {
	if len(f.Outside4) < 2 {
		return nil
	}
	general, _ := f.Sysctls.number("net/ipv4/conf/all/rp_filter")
	x := Finding{Keep: keepSysctl}
	var strict []string
	for _, link := range f.Outside4 {
		name := "net/ipv4/conf/" + link + "/rp_filter"
		if n, ok := f.Sysctls.number(name); ok && max(n, general) == 1 { // the larger one counts
			strict = append(strict, link)
			x.Fix = append(x.Fix, sysctl(name, "2"))
		}
	}
	if len(strict) == 0 {
		return nil
	}
	x.What = "there are several outside links, and rp_filter is strict on " + strings.Join(strict, ", ")
	return []Finding{x}
}

// uplinkPerFlow looks at what the kernel hashes to choose a next hop: with the addresses
// alone, all flows between two hosts take the same one.
func (f *Facts) uplinkPerFlow() []Finding {
	const name = "net/ipv4/fib_multipath_hash_policy"
	policy, known := f.Sysctls.number(name)
	if len(f.SharedLinks) < 2 || !known || policy == 0 {
		return nil
	}
	return []Finding{{
		What: fmt.Sprintf("%s share a default route, and net.ipv4.fib_multipath_hash_policy = %d chooses one of them for each flow; choose by the addresses alone, or keep flows on their uplink by marks "+
			"(docs/recipes/uplink-marks.md)", strings.Join(f.SharedLinks, " and "), policy),
		Fix: []Line{sysctl(name, "0")}, Keep: keepSysctl,
	}}
}

func (f *Facts) fillingUp() []Finding {
	c := f.Status.Conntrack
	if c.Max == 0 || c.Entries*100 < c.Max*80 {
		return nil
	}
	lines, keep := moreEntries(f, control.Finding{})
	return []Finding{{What: fmt.Sprintf("conntrack has %d of %d entries", c.Entries, c.Max), Fix: lines, Keep: keep}}
}

func (f *Facts) fewExpectations() []Finding {
	const name, wanted = "net/netfilter/nf_conntrack_expect_max", 100_000
	n, known := f.Sysctls.number(name)
	carried := slices.ContainsFunc(f.Status.Subnets, func(s control.Subnet) bool { return strings.Contains(s.Carried.By, "expect") })
	if !known || n >= wanted || !carried || f.Untried != "" {
		return nil
	}
	setting := f.Sysctls[name]
	if (setting.Writable || setting.ByRoot) && !f.Running { // a daemon raises it
		return nil
	}
	x := Finding{What: fmt.Sprintf("nf_conntrack_expect_max is %d, so at most %d permissions stand as expectations", n, n*75/100)}
	switch {
	case setting.ByRoot:
		x.What += "; root can raise it"
	case !setting.Writable:
		x.What += "; it can be raised only outside of this container or network namespace"
	}
	if setting.Writable || setting.ByRoot {
		x.Fix, x.Keep = []Line{sysctl(name, fmt.Sprint(wanted))}, keepSysctl
	}
	return []Finding{x}
}

func (f *Facts) savedTables() (all []Finding) {
	for _, s := range f.Saved {
		x := Finding{About: s.Path, What: fmt.Sprintf("%s contains conenatd's own tables: %s", s.Path, strings.Join(s.Tables, ", "))}
		for _, t := range s.Tables {
			x.Fix = append(x.Fix, Line{Shell, fmt.Sprintf("sed -i '/^table %s {/,/^}/d' %s", t, quote(s.Path))})
		}
		all = append(all, x)
	}
	return all
}

func (f *Facts) flowtable() []Finding {
	if len(f.Flowtables) == 0 {
		return nil
	}
	return []Finding{{What: "there are flowtables: " + strings.Join(f.Flowtables, ", ") + "; their flows keep their permissions"}}
}
