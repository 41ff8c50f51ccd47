package userrules_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// sentFlow is a flow that a host opened, or, as a child, one that it answers, with a connmark of 3.
func sentFlow(child bool) *cone.Flow {
	host, peer := endpoint("10.47.11.109:4444"), endpoint("203.0.113.5:5060")
	f := &cone.Flow{Mark: 3, Status: cone.StatusConfirmed | cone.StatusSrcNAT | cone.StatusSeenReply, Src: host, Dst: peer, ReplySrc: peer, ReplyDst: endpoint("198.51.100.1:4444")}
	if child {
		f.Status, f.Labelled = cone.StatusConfirmed|cone.StatusDstNAT, true
	}
	return f
}

func endpoint(s string) cone.Endpoint { return cone.EndpointFrom(netip.MustParseAddrPort(s)) }

const unsureMark = "unsure"

// marksOf says which marks a packet from lan0 has that comes in with 0 or 9.
func marksOf(rs *userrules.Ruleset, f *cone.Flow) string {
	marks, known := rs.Marker().Marks(f, userrules.Link{Index: 7, Name: "lan0"}, []uint32{0, 9}, nil)
	if !known {
		return unsureMark
	}
	slices.Sort(marks)
	return strings.Trim(fmt.Sprint(marks), "[]")
}

// Fails when a rule that does not match counts, when one that may match is left out or counts as
// sure, when a verdict or the order of chains is ignored, and when a mark comes from nowhere.
func TestMarksOfAPacket(t *testing.T) {
	const asIs = "0 9" // both are possible
	table := func(rest string) string { return "table inet m { " + rest + " }" }
	chain := func(hook, rules string) string {
		name := "c" + fmt.Sprint(len(hook)) + fmt.Sprint(len(rules))
		return "chain " + name + " { type filter hook " + hook + "; " + rules + "; }; "
	}
	mangle := func(rules string) string { return table(chain("prerouting priority mangle", rules)) }
	with := func(other, rules string) string {
		return table("chain other { " + other + "; }; " + chain("prerouting priority mangle", rules))
	}
	for name, tt := range map[string]struct {
		nft         string
		want, child string // of the host's own flow, and of a child if it differs
	}{
		"no rule":                {lab.Masquerade, asIs, ""},
		"by port":                {mangle(`iifname "lan0" udp dport 5060 meta mark set 7`), "7", ""},
		"another port":           {mangle(`udp dport 5061 meta mark set 7`), asIs, ""},
		"another link":           {mangle(`iifname "lan1" meta mark set 7`), asIs, ""},
		"some links":             {mangle(`iifname "lan*" meta mark set 7`), "7", ""},
		"another protocol":       {mangle(`tcp dport 5060 meta mark set 7`), asIs, ""},
		"by the host":            {mangle(`ip saddr 10.47.11.0/24 udp sport 4444 counter meta mark set 7`), "7", ""},
		"but one host":           {mangle(`ip saddr != 10.47.11.109 meta mark set 7`), asIs, ""},
		"by a range":             {mangle(`udp dport 5000-5999 meta mark set 7`), "7", ""},
		"another range":          {mangle(`udp dport 6000-6999 meta mark set 7`), asIs, ""},
		"ports of a set":         {mangle(`udp dport { 5060, 5062-5069 } meta mark set 7`), "7", ""},
		"but some ports":         {mangle(`udp dport != { 5060, 5062-5069 } meta mark set 7`), asIs, ""},
		"peers of a set":         {table("set p { type ipv4_addr; flags interval; elements = { 203.0.113.0/24 }; }; " + chain("prerouting priority mangle", `ip daddr @p meta mark set 7`)), "7", ""},
		"a set of packets":       {table("set p { type ipv4_addr; flags dynamic,timeout; }; " + chain("prerouting priority mangle", `ip daddr @p meta mark set 7`)), "0 7 9", ""},
		"perhaps":                {mangle(`ether saddr 02:00:00:00:00:01 meta mark set 7`), "0 7 9", ""},
		"by a map":               {mangle(`meta mark set udp dport map { 5060 : 7, 5061 : 8 }`), "7", ""},
		"not in the map":         {mangle(`meta mark set udp dport map { 5062 : 7, 5061 : 8 }`), asIs, ""},
		"by a range in a map":    {mangle(`meta mark set udp dport map { 5000-5999 : 7, 6000-6999 : 8 }`), "7", ""},
		"by a named map":         {table("map p { type inet_service : mark; elements = { 5060 : 7 }; }; " + chain("prerouting priority mangle", `meta mark set udp dport map @p`)), "7", ""},
		"by the rest of a map":   {table("map p { type inet_service : mark; elements = { 5061 : 8, * : 7 }; }; " + chain("prerouting priority mangle", `meta mark set udp dport map @p`)), "7", ""},
		"by chance":              {mangle(`meta mark set numgen random mod 2 map { 0 : 7, 1 : 8 }`), unsureMark, ""},
		"bits":                   {mangle(`meta mark set meta mark or 0x10`), "16 25", ""},
		"other bits":             {mangle(`meta mark set meta mark and 0xfffffff0 xor 0x5`), "5", ""},
		"no mark yet":            {mangle(`meta mark 0 meta mark set 7`), "7 9", ""},
		"no bit yet":             {mangle(`meta mark and 0xf0 == 0 meta mark set 7`), "7", ""},
		"of the flow":            {mangle(`meta mark set ct mark`), "3", ""},
		"of another flow":        {mangle(`ct mark 4 meta mark set 7`), asIs, ""},
		"of a flow, just set":    {mangle(`ct mark set 5; meta mark set ct mark`), "5", ""},
		"set again":              {mangle(`meta mark set 7; udp dport 5060 meta mark set 8`), "8", ""},
		"accepted before":        {mangle(`udp dport 5060 accept; meta mark set 7`), asIs, ""},
		"perhaps accepted":       {mangle(`ip dscp 46 accept; meta mark set 7`), "0 7 9", ""},
		"a jump":                 {with(`udp dport 5060 meta mark set 7`, `iifname "lan0" jump other; meta mark 7 meta mark set 8`), "8", ""},
		"a return":               {with(`udp dport 5060 return; meta mark set 7`, `jump other`), asIs, ""},
		"an accept in it":        {with(`meta mark set 7; accept`, `jump other; meta mark set 8`), "7", ""},
		"a goto":                 {with(`meta mark set 7`, `goto other; meta mark set 8`), "7", ""},
		"by a verdict map":       {with(`meta mark set 7`, `udp dport vmap { 5060 : jump other, 5061 : drop }`), "7", ""},
		"not in the verdict map": {with(`meta mark set 7`, `udp dport vmap { 5061 : jump other }`), asIs, ""},
		"a map of links":         {with(`meta mark set 7`, `iifname vmap { "lan0" : goto other }`), "7", ""},
		"perhaps in a map":       {with(`meta mark set 7`, `ip dscp vmap { 46 : jump other }`), "0 7 9", ""},
		"new":                    {mangle(`ct state new meta mark set 7`), asIs, ""},
		"established":            {mangle(`ct state established meta mark set 7`), "7", ""},
		"answers":                {mangle(`ct direction reply meta mark set 7`), asIs, "7"},
		"what hosts opened":      {mangle(`ct direction original meta mark set 7`), "7", asIs},
		"translated":             {mangle(`ct status dnat meta mark set 7`), asIs, "7"},
		"before conntrack":       {table(chain("prerouting priority -300", `udp dport 5060 meta mark set 7`)), "7", ""},
		"state, too early":       {table(chain("prerouting priority -300", `ct state established meta mark set 7`)), asIs, ""},
		"connmark, too early":    {table(chain("prerouting priority -300", `meta mark set ct mark`)), asIs, ""},
		"two chains":             {table(chain("prerouting priority -150", `meta mark set 7`) + chain("prerouting priority -140", `meta mark 7 meta mark set 8`)), "8", ""},
		"two chains, turned":     {table(chain("prerouting priority -140", `meta mark set 7`) + chain("prerouting priority -150", `meta mark 7 meta mark set 8`)), "7", ""},
		"two of one priority":    {table(chain("prerouting priority -150", `meta mark set 7`) + chain("prerouting priority -150", `meta mark 7 meta mark set 8`)), "7 8", ""},
		"an accept of one chain": {table(chain("prerouting priority -150", `accept`) + chain("prerouting priority -140", `meta mark set 7`)), "7", ""},
		"dropped":                {mangle(`meta mark set 7; udp dport 5060 drop`), unsureMark, ""},
		"perhaps dropped":        {mangle(`ip dscp 46 drop; meta mark set 7`), "7", ""},
		"after a rewrite":        {mangle(`ip dscp set cs1; udp dport 5060 meta mark set 7`), "0 7 9", ""},
		"a connection":           {mangle(`ct mark set 7`), asIs, ""},
		"after routing":          {table(chain("postrouting priority mangle", `meta mark set 7`)), asIs, ""},
		"IPv6 alone":             {"table ip6 m { " + chain("prerouting priority mangle", `meta mark set 7`) + "}", asIs, ""},
		"of a NAT chain":         {"table ip n { chain c { type nat hook prerouting priority dstnat; meta mark set 7; }; }", asIs, ""},
		"as it comes":            {"table netdev n { chain c { type filter hook ingress device lan0 priority 0; meta mark set 7; }; }", asIs, ""},
		"dormant":                {"table ip m { flags dormant; " + chain("prerouting priority mangle", `meta mark set 7`) + " }", asIs, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(tt.nft))
			checkMarks(t, ruleset(t, l), tt.want, tt.child)
		})
	}
	for name, tt := range map[string]struct{ rules, want, child string }{
		"by port":             {"-i lan0 -p udp --dport 5060 -j MARK --set-mark 7", "7", ""},
		"another port":        {"-p udp --dport 5061 -j MARK --set-mark 7", asIs, ""},
		"some bits":           {"-p udp --dport 5060 -j MARK --set-xmark 0x70/0xf0", "112 121", ""},
		"by bits":             {"-m mark --mark 0/0xf0 -j MARK --set-mark 7", "7", ""},
		"of the flow":         {"-j CONNMARK --restore-mark", "3", ""},
		"bits of the flow":    {"-j CONNMARK --restore-mark --nfmask 0xff --ctmask 0x2", "2", ""},
		"by the flow's":       {"-m connmark --mark 3 -j MARK --set-mark 7", "7", ""},
		"saved and restored":  {"-j MARK --set-mark 7\n-A PREROUTING -j CONNMARK --save-mark\n-A PREROUTING -j MARK --set-mark 8\n-A PREROUTING -j CONNMARK --restore-mark", "7", ""},
		"set and restored":    {"-j CONNMARK --set-mark 7\n-A PREROUTING -j CONNMARK --restore-mark", "7", ""},
		"new":                 {"-m conntrack --ctstate NEW -j MARK --set-mark 7", asIs, ""},
		"answers":             {"-m conntrack --ctdir REPLY -j MARK --set-mark 7", asIs, "7"},
		"accepted before":     {"-d 203.0.113.0/24 -j ACCEPT\n-A PREROUTING -j MARK --set-mark 7", asIs, ""},
		"perhaps":             {"-m dscp --dscp 46 -j MARK --set-mark 7", "0 7 9", ""},
		"to a proxy":          {"-p udp -j TPROXY --on-port 9 --tproxy-mark 7", unsureMark, ""},
		"a proxy of others":   {"-p tcp -j TPROXY --on-port 9 --tproxy-mark 7", asIs, ""},
		"several ports":       {"-s 10.47.11.0/24 -p udp -m multiport --dports 5070,5000:5069 -j MARK --set-mark 7", "7", ""},
		"several other ports": {"-p udp -m multiport --ports 5000:5059,5070 -j MARK --set-mark 7", asIs, ""},
		"but several ports":   {"-p udp -m multiport ! --sports 4444,5070 -j MARK --set-mark 7", asIs, ""},
	} {
		withIPTables(t, name, "*mangle\n-A PREROUTING "+tt.rules+"\nCOMMIT\n", func(t *testing.T, l *lab.Lab) { checkMarks(t, ruleset(t, l), tt.want, tt.child) })
	}
	withIPTables(t, "a chain", "*mangle\n:some -\n-A PREROUTING -i lan0 -p udp -m multiport --dports 5060,5061 -j some\n-A some -m mark --mark 0 -j MARK --set-xmark 7/0xf\nCOMMIT\n",
		func(t *testing.T, l *lab.Lab) { checkMarks(t, ruleset(t, l), "7 9", "") })
	withIPTables(t, "raw", "*raw\n-A PREROUTING -p udp --dport 5060 -j MARK --set-mark 7\nCOMMIT\n*mangle\n-A PREROUTING -m mark --mark 7 -j MARK --set-mark 8\nCOMMIT\n",
		func(t *testing.T, l *lab.Lab) { checkMarks(t, ruleset(t, l), "8", "") })
}

func checkMarks(t *testing.T, rs *userrules.Ruleset, want, child string) {
	t.Helper()
	if child == "" {
		child = want
	}
	if got := marksOf(rs, sentFlow(false)); got != want {
		t.Errorf("of the host's own flow: %s, want %s", got, want)
	}
	if got := marksOf(rs, sentFlow(true)); got != child {
		t.Errorf("of a child: %s, want %s", got, child)
	}
}
