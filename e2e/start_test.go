package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// forwardsOneNetwork lets children into lan0's network alone.
const forwardsOneNetwork = `table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established accept
		ip daddr 10.47.11.0/24 ct status dnat accept
		iifname { "lan0", "guest0" } oifname "wan0" accept
	}
}
`

// The log of a start begins with what a newcomer has to know: the subnets, what carries their
// permissions, whether the firewall lets it work, where to look next, and what is wrong.
//
// Fails when one of these is not said, or not among the first lines.
func TestLogOfAStartBeginsWithWhatANewcomerNeeds(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{Guest: true, Rules: lab.Masquerade + forwardsOneNetwork})
	s.Start("--subnet", lab.InsideNet.String(), "--subnet", lab.GuestNet.String())
	var lines []string
	for line := range strings.Lines(s.Daemon.Output()) {
		_, rest, _ := strings.Cut(line, " ") // without the time
		lines = append(lines, strings.TrimSpace(rest))
	}
	want := []string{
		`level=INFO msg="conenatd runs"`,
		`level=INFO msg="permissions are carried by nft: your firewall accepts flows with ct status dnat" subnets=[10.47.11.0/24]`,
		`level=INFO msg="permissions are carried by nft: neither gets through: inet filter forward drops DNATed and RELATED flows" subnets=[10.47.12.0/24]`,
		`level=INFO msg="'conenatd status' says whether it works, 'conenatd list' who may send to whom, 'conenatd doctor' how to repair what is wrong"`,
		`level=WARN msg="your firewall drops the flows of peers into subnet 10.47.12.0/24: inet filter forward; let it accept`,
	}
	if !slices.EqualFunc(lines[:min(len(lines), len(want))], want, strings.HasPrefix) {
		t.Errorf("it begins with\n%s\nwant\n%s", strings.Join(lines, "\n"), strings.Join(want, "\n"))
	}
	if has := `subnets="[10.47.11.0/24 10.47.12.0/24]" outside=[wan0]`; !strings.Contains(lines[0], has) {
		t.Errorf("%q has not %q", lines[0], has)
	}
	for _, line := range lines {
		if strings.Contains(line, "permissions are carried") && strings.Count(strings.Join(lines, "\n"), line) > 1 {
			t.Errorf("it says twice %q", line)
		}
	}
}
