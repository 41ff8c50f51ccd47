package control

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
)

// An Explanation says what becomes of a packet from a peer to an outside endpoint, and why.
type Explanation struct {
	Peer     netip.Addr     `json:"peer"`
	PeerPort uint16         `json:"peer_port,omitempty"` // missing: any port that has no flow
	Ext      netip.AddrPort `json:"ext"`
	Verdict  string         `json:"verdict"`
	To       netip.AddrPort `json:"to,omitzero"` // where it goes, if known
	Steps    []Step         `json:"steps"`       // the kernel's checks, up to the one that decides
}

// A Step is one check of the kernel's.
type Step struct {
	ID     string `json:"id"`
	Result string `json:"result"`
	Text   string `json:"text"` // for people
}

// ParsePacket parses what explain asks about: the peer, an address, or an endpoint; the port is 0
// without one; and the outside endpoint.
func ParsePacket(peer, ext string) (from, to netip.AddrPort, err error) {
	a, isAddr := parseAddr(peer)
	from, isEndpoint := parseEndpoint(peer)
	if isAddr {
		from = netip.AddrPortFrom(a, 0)
	}
	to, ok := parseEndpoint(ext)
	switch {
	case !isAddr && !isEndpoint:
		return from, to, fmt.Errorf("peer %q: expected an address such as 203.0.113.5, or one with a port, 203.0.113.5:5070", peer)
	case !ok:
		return from, to, fmt.Errorf(`outside endpoint %q: expected an address and a port such as 198.51.100.1:5060, as "conenatd list" shows it`, ext)
	case from.Addr().Is4() != to.Addr().Is4():
		return from, to, fmt.Errorf("peer %q and outside endpoint %q: expected both of IPv4, or both of IPv6", peer, ext)
	}
	return from, to, nil
}

// Inactive says in words why a permission does not stand.
func Inactive(p Permission) string {
	if p.Reason == "" {
		return Words(p.State)
	}
	return Words(p.State) + ", " + Words(p.Reason)
}

// verdicts are the words for the identifiers of verdicts. TO stands for Explanation.To.
var verdicts = map[string]string{
	"arrives": "ARRIVES at TO", "forwarded": "goes where your rule forwards it: TO", "gateway": "goes to the gateway itself",
	"lost": "is LOST", "unknown": "cannot be told for sure",
}

// WriteExplanation writes an explanation as text for people.
func WriteExplanation(w io.Writer, x Explanation) error {
	from := x.Peer.String() + ", any port without a flow,"
	if x.PeerPort != 0 {
		from = netip.AddrPortFrom(x.Peer, x.PeerPort).String()
	}
	to := "an unknown host"
	if x.To.IsValid() {
		to = x.To.String()
	}
	fmt.Fprintf(w, "from %s to %v: %s\n", from, x.Ext, strings.ReplaceAll(cmp.Or(verdicts[x.Verdict], x.Verdict), "TO", to))
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, s := range x.Steps {
		fmt.Fprintf(tw, "  %s\t%s\t%s\n", s.ID, s.Result, s.Text)
	}
	return tw.Flush()
}
