package lab

import (
	"fmt"
	"net/netip"
)

// Rule sets for the gateway, as text for "nft -f -". NAT and filter are separate
// tables, so Masquerade + DropPolicy is a rule set too.
const (
	// NoRules leaves the gateway without rules, and so without NAT and conntrack.
	NoRules = "# no rules\n"

	// Masquerade is the NAT of most gateways.
	Masquerade = `table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "wan0" masquerade
	}
}
`

	// DropPolicy is a usual stateful firewall: packets from inside pass, packets
	// from outside only if they belong to an existing flow.
	DropPolicy = `table inet filter {
	chain input {
		type filter hook input priority filter; policy drop;
		ct state established,related accept
		iifname "lo" accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
	}
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established,related accept
		iifname "lan0" accept
		iifname "guest0" oifname "wan0" accept
	}
}
`

	// IPTablesMasquerade is Masquerade for [Lab.IPTables].
	IPTablesMasquerade = `*nat
-A POSTROUTING -o wan0 -j MASQUERADE
COMMIT
`

	// IPTablesDropPolicy is DropPolicy for [Lab.IPTables].
	IPTablesDropPolicy = `*filter
:INPUT DROP
:FORWARD DROP
-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A INPUT -i lo -j ACCEPT
-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
-A FORWARD -i lan0 -j ACCEPT
-A FORWARD -i guest0 -o wan0 -j ACCEPT
COMMIT
`
)

// MasqueradeRange is Masquerade to outside ports from lo to hi.
func MasqueradeRange(lo, hi uint16) string {
	return sourceNAT(fmt.Sprintf("masquerade to :%d-%d", lo, hi))
}

// SNATTo translates to a fixed IPv4 address of the gateway.
func SNATTo(addr netip.Addr) string {
	return sourceNAT(fmt.Sprintf("snat to %s", addr))
}

// sourceNAT is Masquerade with another statement for TCP and UDP; nft accepts a
// port range only after a match on the protocol.
func sourceNAT(statement string) string {
	return fmt.Sprintf(`table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat; policy accept;
		oifname "wan0" meta l4proto { tcp, udp } %s
		oifname "wan0" masquerade
	}
}
`, statement)
}
