package doctor

import (
	"fmt"
	"net/netip"
	"slices"
)

// firewalld returns the lines that change firewalld, now and for the next boot.
func firewalld(changes ...string) (lines []Line) {
	for _, c := range changes {
		lines = append(lines, Line{Shell, "firewall-cmd --permanent " + c})
	}
	return append(lines, Line{Shell, "firewall-cmd --reload"})
}

// zoneOf is the zone of a link, in a shell. A link that is in none belongs to the default one.
func zoneOf(link string) string {
	return "$(firewall-cmd --get-zone-of-interface=" + quote(link) + " || firewall-cmd --get-default-zone)"
}

// firewalldOut returns the lines that let UDP flows of the subnet out. Between zones that takes a policy,
// and policies match only links that were put into a zone: a link stays in its zone, or in the default one.
func (f *Facts) firewalldOut(subnet netip.Prefix) []Line {
	const policy = "udp-out"
	changes := []string{fmt.Sprintf("--new-policy=%s", policy)}
	for _, link := range slices.Concat(f.Inside, f.Status.Outside) {
		changes = append(changes, fmt.Sprintf("--zone=%s --change-interface=%s", zoneOf(link), quote(link)))
	}
	with := func(option string) { changes = append(changes, fmt.Sprintf("--policy=%s %s", policy, option)) }
	for _, link := range f.Inside {
		with("--add-ingress-zone=" + zoneOf(link))
	}
	for _, link := range f.Status.Outside {
		with("--add-egress-zone=" + zoneOf(link))
	}
	family := "ipv4"
	if subnet.Addr().Is6() {
		family = "ipv6"
	}
	with("--add-rich-rule=" + quote(fmt.Sprintf("rule family=%s source address=%v protocol value=udp accept", family, subnet)))
	lines := firewalld(changes...)
	// Another subnet may have made the policy.
	lines[0].Line = "firewall-cmd --permanent --get-policies | tr ' ' '\\n' | grep -qx " + policy + " || " + lines[0].Line
	return lines
}
