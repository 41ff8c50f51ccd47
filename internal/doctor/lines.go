package doctor

import (
	"cmp"
	"fmt"
	"net/netip"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// A Firewall is what wrote the user's rules.
type Firewall string

// The firewalls, those first that others build upon.
const (
	NFT            Firewall = "nft"
	IPTablesLegacy Firewall = "iptables-legacy"
	IPTablesNFT    Firewall = "iptables-nft"
	Docker         Firewall = "docker"
	UFW            Firewall = "ufw"
	Firewalld      Firewall = "firewalld"
	FW4            Firewall = "fw4"
)

const (
	legacyFilter = "iptables-legacy filter"
	nftFilter    = "ip filter"
	dockerChain  = "DOCKER-USER"
	ufwChain     = "ufw-before-forward"
)

// Tables and Chains are what Rules tells of, if they are there.
var (
	Tables = []string{"inet fw4", "inet firewalld", legacyFilter, "iptables-legacy nat", nftFilter, "ip nat"}
	Chains = [][2]string{
		{nftFilter, dockerChain},
		{nftFilter, ufwChain},
		{nftFilter, "FORWARD"},
		{"ip nat", "POSTROUTING"},
		{legacyFilter, dockerChain},
		{legacyFilter, ufwChain},
		{"ip6 filter", dockerChain},
		{"ip6 filter", "ufw6-before-forward"},
		{"ip6tables-legacy filter", dockerChain},
		{"ip6tables-legacy filter", "ufw6-before-forward"},
	}
)

// firewall returns what wrote the rules, as far as they tell.
func (f *Facts) firewall() Firewall {
	is := func(chain string) bool {
		return f.Rules.Chains[nftFilter+" "+chain] || f.Rules.Chains[legacyFilter+" "+chain]
	}
	switch {
	case f.Rules.Tables["inet fw4"]:
		return FW4
	case f.Rules.Tables["inet firewalld"]:
		return Firewalld
	case is(ufwChain):
		return UFW
	case is(dockerChain):
		return Docker
	case f.Rules.Tables[legacyFilter], f.Rules.Tables["iptables-legacy nat"]:
		return IPTablesLegacy
	case f.Rules.Chains[nftFilter+" FORWARD"], f.Rules.Chains["ip nat POSTROUTING"]:
		return IPTablesNFT
	}
	return NFT
}

// accept returns the lines that let children of the subnet pass the chain, which is named as
// in userrules.ChildVerdicts. Children of a subnet that is not translated are RELATED, all
// others are DNATed, too. A line comes first in its chain, so it matches nothing but UDP to
// the subnet, and children of the map alone where nftables can tell these from port forwards
// of the user's. There is none for firewalld, which can only open all port forwards.
func (f *Facts) accept(chain string, s control.Subnet) (lines []Line, keep string) {
	title, name, ok := cutLast(chain)
	if !ok || title == "inet firewalld" {
		return nil, ""
	}
	translated := s.Prefix.Addr().Is4() && !s.Routed
	if program, table := iptables(title, name); program != "" {
		return f.acceptIPTables(title, program, table, name, s.Prefix, translated)
	}
	family := "ip"
	if s.Prefix.Addr().Is6() {
		family = "ip6"
	}
	udp := fmt.Sprintf("meta l4proto udp %s daddr %v ", family, s.Prefix)
	var match string
	switch {
	case !translated:
		match = udp + "ct state related accept"
	case f.mapLabels():
		match = "ct label 126 accept"
	default:
		match, keep = udp+"ct status dnat accept", alsoForwards
	}
	rule := iifname(f.Status.Outside) + match
	lines = []Line{nft("insert rule %s %s %s", title, name, rule)}
	if title == "inet fw4" {
		return lines, fmt.Sprintf("write '%s' into /etc/conenatd.nft, and a 'config include' for it into /etc/config/firewall "+
			"(type nftables, position chain-pre, chain %s)", rule, name) + keep
	}
	return lines, saveNFT + keep
}

// acceptEarly returns the lines that let children of the subnet pass a chain of prerouting before
// NAT: those of expectations, which are RELATED. Nothing tells others there.
func (f *Facts) acceptEarly(s control.Subnet, inMap bool) (lines []Line, keep string) {
	if s.Carried.Before != control.BeforeNAT || inMap || !strings.Contains(f.Status.Backend, "expect") {
		return nil, ""
	}
	title, name, ok := cutLast(s.Carried.Chain)
	if !ok || title == "inet firewalld" {
		return nil, ""
	}
	const behind = "; put it behind rules that set marks"
	program, table := iptables(title, name)
	if program == "" {
		rule := iifname(f.Status.Outside) + "meta l4proto udp ct state related accept"
		return []Line{nft("insert rule %s %s %s", title, name, rule)}, saveNFT + behind
	}
	for _, link := range f.Status.Outside {
		lines = append(lines, Line{Shell, fmt.Sprintf("%s -t %s -I %s -i %s -p udp -m conntrack --ctstate RELATED -j ACCEPT", program, table, name, quote(link))})
	}
	return lines, saveIPTables + behind
}

// alsoForwards says what a line opens beside children.
const alsoForwards = "; the rule accepts port forwards of yours for UDP to this subnet, too: put it behind rules that restrict these"

// mapLabels reports whether the map admits children, and labels them (docs/hooks.md).
func (f *Facts) mapLabels() bool { return strings.Contains(f.Status.Backend, "nft") && !f.NoLabels }

// iptables returns the program that writes the rules of a chain, and its table; nothing if
// it is nft.
func iptables(title, chain string) (program, table string) {
	kind, table, _ := strings.Cut(title, " ")
	switch {
	case kind == "iptables-legacy" || kind == "ip6tables-legacy":
		return kind, table
	case kind == "ip" && chain == strings.ToUpper(chain):
		return "iptables-nft", table
	case kind == "ip6" && chain == strings.ToUpper(chain):
		return "ip6tables-nft", table
	}
	return "", ""
}

func (f *Facts) acceptIPTables(title, program, table, chain string, subnet netip.Prefix, translated bool) (lines []Line, keep string) {
	state, also := "DNAT", alsoForwards
	if !translated {
		state, also = "RELATED", ""
	}
	var matches []string
	for _, link := range f.Status.Outside {
		matches = append(matches, fmt.Sprintf("-i %s -p udp -d %v -m conntrack --ctstate %s", quote(link), subnet, state))
	}
	lines, keep = f.insertIPTables(title, program, table, chain, matches)
	return lines, keep + also
}

// insertIPTables returns the lines that accept what matches say, where the firewall leaves rules of
// the user's alone.
func (f *Facts) insertIPTables(title, program, table, chain string, matches []string) (lines []Line, keep string) {
	six := ""
	if strings.HasPrefix(program, "ip6") {
		six = "6"
	}
	ufw := "ufw" + six + "-before-forward"
	atUFW := f.Rules.Chains[title+" "+ufw]
	atDocker := !atUFW && f.Rules.Chains[title+" "+dockerChain]
	switch {
	case atUFW:
		chain = ufw
	case atDocker:
		chain = dockerChain
	}
	option := ""
	if table != "filter" {
		option = "-t " + table + " "
	}
	var rules []string
	for _, match := range matches {
		rule := fmt.Sprintf("%s %s -j ACCEPT", chain, match)
		lines = append(lines, Line{Shell, fmt.Sprintf("%s %s-I %s", program, option, rule)})
		rules = append(rules, "'-A "+rule+"'")
	}
	switch {
	case atUFW:
		keep = fmt.Sprintf("write %s into the *filter part of /etc/ufw/before%s.rules, in front of its COMMIT", strings.Join(rules, " and "), six)
	case atDocker:
		keep = "Docker leaves its chain DOCKER-USER alone; run the line at each boot"
	default:
		keep = saveIPTables
	}
	return lines, keep
}

// acceptOut returns the lines that let UDP flows of the subnet out by a chain of the forward hook.
func (f *Facts) acceptOut(by control.Blocked, subnet netip.Prefix) (lines []Line, keep string) {
	title, name, ok := cutLast(by.Chain)
	if !ok || by.Hook != "forward" || len(f.Inside) == 0 {
		return nil, ""
	}
	if title == "inet firewalld" {
		return f.firewalldOut(subnet), ""
	}
	if program, table := iptables(title, name); program != "" {
		var matches []string
		for _, in := range f.Inside {
			for _, out := range f.Status.Outside {
				matches = append(matches, fmt.Sprintf("-i %s -o %s -p udp -s %v", quote(in), quote(out), subnet))
			}
		}
		return f.insertIPTables(title, program, table, name, matches)
	}
	family := "ip"
	if subnet.Addr().Is6() {
		family = "ip6"
	}
	keep = saveNFT
	if title == "inet fw4" {
		keep = "write a 'config forwarding' from the zone of the hosts to the zone of the uplink into /etc/config/firewall"
	}
	rule := fmt.Sprintf("%s%smeta l4proto udp %s saddr %v accept", ifname("iifname", f.Inside), ifname("oifname", f.Status.Outside), family, subnet)
	return []Line{nft("insert rule %s %s %s", title, name, rule)}, keep
}

// deleteRule returns the line that deletes a rule, which is named by its handle, or for iptables-legacy by
// the words of spec, without any by its number. firewalld and fw4 write their rules anew.
func deleteRule(rule string, spec []string) (line Line, ok bool) {
	if strings.HasPrefix(rule, "inet firewalld ") || strings.HasPrefix(rule, "inet fw4 ") {
		return line, false
	}
	if chain, number, legacy := strings.Cut(rule, " rule "); legacy {
		title, name, _ := cutLast(chain)
		program, table := iptables(title, name)
		which := number
		if len(spec) > 0 {
			which = words(spec)
		}
		return Line{Shell, fmt.Sprintf("%s -t %s -D %s %s", program, table, quote(name), which)}, program != ""
	}
	return Line{Shell, "nft delete rule " + rule}, true
}

// lastFirst sorts rules by their chains, and the last rule of a chain to the front.
func lastFirst(a, b string) int {
	chainA, numberA, _ := cutLast(a)
	chainB, numberB, _ := cutLast(b)
	// Without leading zeros, the longer number is the larger one.
	return cmp.Or(cmp.Compare(chainA, chainB), cmp.Compare(len(numberB), len(numberA)), cmp.Compare(numberB, numberA))
}

// How to keep rules that were added by hand.
const (
	saveIPTables = "save the rules as your system does, for example with 'netfilter-persistent save'"
	saveNFT      = "write the rule into /etc/nftables.conf, too, or wherever these rules come from"
)

// masquerade returns the lines that translate a subnet on a link.
func (f *Facts) masquerade(subnet netip.Prefix, link string) (lines []Line, keep string) {
	switch fw := f.firewall(); fw {
	case FW4:
		return []Line{nft(`insert rule inet fw4 srcnat oifname "%s" ip saddr %v masquerade`, link, subnet)},
			"set option masq '1' in the zone of " + link + " in /etc/config/firewall"
	case Firewalld:
		return firewalld("--zone=" + zoneOf(link) + " --add-masquerade"), ""
	case UFW, Docker, IPTablesLegacy, IPTablesNFT:
		program := "iptables-nft"
		if f.Rules.Tables[legacyFilter] || f.Rules.Tables["iptables-legacy nat"] {
			program = "iptables-legacy"
		}
		keep = saveIPTables
		if fw == UFW {
			keep = fmt.Sprintf("write '-A POSTROUTING -s %v -o %s -j MASQUERADE' into a *nat part of /etc/ufw/before.rules", subnet, link)
		}
		return []Line{{Shell, fmt.Sprintf("%s -t nat -A POSTROUTING -s %v -o %s -j MASQUERADE", program, subnet, quote(link))}}, keep
	}
	return []Line{nft(`table ip source_nat { chain postrouting { type nat hook postrouting priority srcnat; oifname "%s" ip saddr %v masquerade; }; }`,
		link, subnet)}, "write the table into /etc/nftables.conf, too"
}

// nft is a line that runs an nft command.
func nft(format string, args ...any) Line {
	return Line{Shell, "nft " + quote(fmt.Sprintf(format, args...))}
}

// iifname matches packets that come by the links.
func iifname(links []string) string { return ifname("iifname", links) }

// ifname matches packets by one of their links.
func ifname(key string, links []string) string {
	switch len(links) {
	case 0:
		return ""
	case 1:
		return fmt.Sprintf("%s \"%s\" ", key, links[0])
	}
	return fmt.Sprintf("%s { \"%s\" } ", key, strings.Join(links, `", "`))
}

// quote makes one word of s for a shell.
func quote(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:@", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// words are arguments for a shell.
func words(all []string) string {
	quoted := make([]string, len(all))
	for i, s := range all {
		quoted[i] = quote(s)
	}
	return strings.Join(quoted, " ")
}

// cutLast cuts off the last word.
func cutLast(s string) (before, last string, ok bool) {
	i := strings.LastIndexByte(s, ' ')
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// sysctl is a line that changes a setting. A name with a dot, of a link, keeps its slashes
// (sysctl(8)).
func sysctl(name, value string) Line {
	if !strings.Contains(name, ".") {
		name = strings.ReplaceAll(name, "/", ".")
	}
	return Line{Shell, "sysctl -w " + quote(name) + "=" + value}
}

const keepSysctl = "write it into a file of /etc/sysctl.d, too"
