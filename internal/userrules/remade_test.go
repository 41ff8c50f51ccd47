package userrules_test

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A file that begins with "flush ruleset" makes everything anew, with the same handles and
// names.
//
// Fails when objects with the same numbers and names count as unchanged.
func TestFileThatIsLoadedAgainIsReadAgain(t *testing.T) {
	file := func(ports, set, states string) string {
		return `flush ruleset
table inet fw {
	set games { type inet_service; ` + set + `; }
	chain pre { type nat hook prerouting priority dstnat
		udp dport { ` + ports + ` } dnat ip to 10.47.11.109
		udp dport @games dnat ip to 10.47.11.109
	}
	chain forward { type filter hook forward priority filter; policy drop
		ct state { ` + states + ` } accept
	}
}
`
	}
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	r := reader(t, l)
	for _, step := range []struct {
		rules   string
		want    []string
		related userrules.Answer
	}{
		{file("3074, 3478", "elements = { 5060 }", "established, related"), []string{"3074 > ip", "3478 > ip", "5060 > ip"}, userrules.Accepted},
		{file("3074, 3480", "elements = { 5060 }", "established, related"), []string{"3074 > ip", "3480 > ip", "5060 > ip"}, userrules.Accepted},
		{file("3074, 3480", "flags interval; elements = { 5060-5063 }", "established, related"), []string{"3074 > ip", "3480 > ip", "5060-5063 > ip"}, userrules.Accepted},
		{file("3074, 3480", "flags interval; elements = { 5060-5063 }", "established, new"), []string{"3074 > ip", "3480 > ip", "5060-5063 > ip"}, userrules.Dropped},
	} {
		check(t, l.NFT(step.rules))
		if got := read(t, r); !slices.Equal(got.forwards, step.want) {
			t.Errorf("forwards %v, want %v, of\n%s", got.forwards, step.want, step.rules)
		}
		rs, err := r.Read()
		check(t, err)
		verdicts, err := rs.Children(nil, []userrules.Link{{Name: "lan0"}}, []netip.Prefix{lab.InsideNet})
		check(t, err)
		if verdicts[0].MostRelated != step.related {
			t.Errorf("related %v, want %v, of\n%s", verdicts[0].MostRelated, step.related, step.rules)
		}
	}
}

// Fails when a change of another chain that looks up the same set loses the set's elements.
func TestSetOfAChainThatStaysIsKnown(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.NFT(`table inet fw {
	set games { type inet_service; elements = { 3074, 3478 }; }
	chain pre { type nat hook prerouting priority dstnat
		udp dport @games dnat ip to 10.47.11.109
	}
	chain forward { type filter hook forward priority filter; policy drop
		udp dport @games accept
	}
}
`))
	r := reader(t, l)
	want := []string{"3074 > ip", "3478 > ip"}
	for range 3 {
		if got := read(t, r); !slices.Equal(got.forwards, want) {
			t.Errorf("forwards %v, want %v", got.forwards, want)
		}
		check(t, l.NFT("add rule inet fw forward udp dport 9 accept"))
	}
}

// Fails when a set that was not read, because its rule is for TCP, makes the whole hook
// unreadable if an earlier rule writes into the packet.
func TestRuleForAnotherProtocolBehindOneThatRewrites(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.NFT(`table ip fw {
	chain forward { type filter hook forward priority filter; policy accept
		ip dscp set cs1
		ip protocol tcp tcp dport { 22, 80 } accept
	}
}
`))
	if _, err := childrenOf(l.Gateway.FD(), nil, []netip.Prefix{lab.InsideNet}); err != nil {
		t.Error(err)
	}
}
