package lab

import "strings"

// NFT adds a rule set in nft's language to the gateway, in one transaction.
func (l *Lab) NFT(rules string) error {
	_, err := l.Gateway.feed(rules, "nft", "-f", "-")
	return err
}

// The two variants of iptables.
const (
	IPTablesNFT    = "iptables-nft"
	IPTablesLegacy = "iptables-legacy"
)

// IPTables adds rules in the format of iptables-save to the gateway, with the given
// variant. Existing rules stay.
func (l *Lab) IPTables(variant, rules string) error {
	_, err := l.Gateway.feed(rules, variant+"-restore", "--noflush")
	return err
}

// Conntrack returns what "conntrack -L" with these arguments lists in the
// gateway, a line for each entry: Conntrack("-p", "udp"), Conntrack("expect").
func (l *Lab) Conntrack(args ...string) ([]string, error) {
	out, err := l.Gateway.Output("conntrack", append([]string{"-L"}, args...)...)
	return strings.FieldsFunc(out, func(r rune) bool { return r == '\n' }), err
}

// Flush deletes all conntrack entries of the gateway; the kernel then also deletes
// the expectations of these entries.
func (l *Lab) Flush() error {
	_, err := l.Gateway.Output("conntrack", "-F")
	return err
}

// Ruleset returns the nftables rules of the gateway without counters and timers, so
// that listings can be compared. It does not show iptables-legacy.
func (l *Lab) Ruleset() (string, error) {
	return l.Gateway.Output("nft", "--stateless", "list", "ruleset")
}
