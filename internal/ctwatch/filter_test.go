package ctwatch

import (
	"encoding/binary"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when two ranges become one that covers less, or when too many or too few are left.
func TestFewerRangesCoverAll(t *testing.T) {
	r := rand.New(rand.NewPCG(5, 1))
	for range 1000 {
		var all []Range
		for range 2 + r.IntN(20) {
			first, port := byte(r.UintN(4)), uint16(r.UintN(1000))
			all = append(all, Range{
				FirstAddr: netip.AddrFrom4([4]byte{198, 51, 100, first}), LastAddr: netip.AddrFrom4([4]byte{198, 51, 100, first + byte(r.UintN(3))}),
				FirstPort: port, LastPort: port + uint16(r.UintN(10)),
			})
		}
		most := 1 + r.IntN(10)
		few := fewer(all, most)
		if want := min(most, len(all)); len(few) != want {
			t.Fatalf("%d ranges for %d, want %d", len(few), len(all), want)
		}
		for _, x := range all {
			if !slices.ContainsFunc(few, func(y Range) bool {
				return y.FirstAddr.Compare(x.FirstAddr) <= 0 && y.LastAddr.Compare(x.LastAddr) >= 0 &&
					y.FirstPort <= x.FirstPort && y.LastPort >= x.LastPort
			}) {
				t.Fatalf("%v is not covered by %v, made of %v", x, few, all)
			}
		}
	}
}

// Ranges with few ports between them are merged first.
func TestFewerRangesKeepWhatIsFarApart(t *testing.T) {
	a, b := netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")
	ports := func(a netip.Addr, first, last uint16) Range {
		return Range{FirstAddr: a, LastAddr: a, FirstPort: first, LastPort: last}
	}
	all := []Range{ports(b, 5060, 5060), ports(a, 5060, 5060), ports(a, 1000, 1000), ports(a, 1002, 1009), ports(a, 5061, 5070)}
	want := []Range{ports(a, 1000, 1009), ports(a, 5060, 5070), ports(b, 5060, 5060)}
	if got := fewer(all, 3); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Fails when a range of some sources comes to cover others, or takes the room of ranges of all.
func TestFewerRangesOfSomeSourcesStayAsTheyAre(t *testing.T) {
	a := netip.MustParseAddr("198.51.100.1")
	var all []Range
	for i := range uint16(1000) {
		r := Range{FirstAddr: a, LastAddr: a, FirstPort: 7 * i, LastPort: 7 * i}
		if i%2 == 0 {
			from := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
			r.FirstSource, r.LastSource = from, from
		}
		all = append(all, r)
	}
	for most, want := range map[int]int{mostForwarded: mostForSources, leastForwarded: leastForwarded * mostForSources / mostForwarded} {
		few := fewer(all, most)
		ofSome := slices.DeleteFunc(slices.Clone(few), func(r Range) bool { return !r.ofSome() })
		if len(ofSome) != want || len(few) != most+want {
			t.Errorf("%d ranges, %d of some sources, want %d and %d", len(few), len(ofSome), most+want, want)
		}
		for _, r := range ofSome {
			if !slices.Contains(all, r) {
				t.Errorf("%v is new", r)
			}
		}
	}
}

// The kernel accepts the longest program.
//
// Fails when more ranges are compared than there is room for beside the sources.
func TestSocketFilterWithTheMostOfAllIsTaken(t *testing.T) {
	s := Sources{Prefixes: slices.Repeat([]netip.Prefix{netip.MustParsePrefix("2001:db8::1/128")}, mostSources), Labelled: true, Early: true}
	for i := range uint16(1000) {
		a := netip.AddrFrom4([4]byte{198, 51, 100, byte(i % 5)})
		from := netip.AddrFrom4([4]byte{203, 0, 113, byte(i)})
		r := Range{FirstAddr: a, LastAddr: a, FirstPort: 7 * i, LastPort: 7 * i}
		s.Forwarded, s.Served = append(s.Forwarded, r), append(s.Served, r)
		r.FirstSource, r.LastSource, r.FirstPort, r.LastPort = from, from, r.FirstPort+1, r.LastPort+1
		s.Forwarded = append(s.Forwarded, r)
	}
	prog, err := eventFilter(s)
	if err != nil || len(prog) > 4096 {
		t.Errorf("%d instructions, %v", len(prog), err)
	}
	if lacksOptmem(t) {
		t.Skip("net.core.optmem_max is less than the largest filter needs, as by default before Linux 6.8")
	}
	passes := filtered(t, s)
	for i, r := range s.Forwarded {
		if !r.ofSome() && passes(ended("203.0.113.5", r.FirstAddr.String(), r.FirstPort, cone.StatusDstNAT)) {
			t.Fatalf("the end of a flow of forward %d passes", i)
		}
	}
	if !passes(ended("203.0.113.5", "198.51.100.1", 40_000, cone.StatusDstNAT)) {
		t.Error("the end of a flow of none does not pass")
	}
}

// begun is the event of the beginning of a flow.
func begun(src, dst string, port uint16, status cone.Status) []byte {
	msg := ended(src, dst, port, status)
	binary.NativeEndian.PutUint16(msg[4:], ctType(ipctnlMsgCTNew))
	return msg
}

// Fails when a flow that could keep a peer from a permission is left out, or one to a socket of
// the gateway is not.
func TestSocketFilterReportsEarlyFlows(t *testing.T) {
	at := func(first, last string, port uint16) Range {
		return Range{FirstAddr: netip.MustParseAddr(first), LastAddr: netip.MustParseAddr(last), FirstPort: port, LastPort: port}
	}
	const ours, peer = "198.51.100.1", "203.0.113.5"
	s := Sources{
		Prefixes: []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}, Labelled: true, Early: true,
		Served: []Range{at("0.0.0.0", "255.255.255.255", 53), at(ours, ours, 4000)},
	}
	for name, tc := range map[string]struct {
		msg  []byte
		pass bool
	}{
		"early":                               {begun(peer, ours, 5060, 0), true},
		"early, ended":                        {ended(peer, ours, 5060, 0), false},
		"early, over IPv6":                    {begun("2001:db8::5", "2001:db8::1", 53, 0), true},
		"early, over IPv6, ended":             {ended("2001:db8::5", "2001:db8::1", 53, 0), false},
		"served on all addresses":             {begun(peer, ours, 53, 0), false},
		"served on all addresses, ended":      {ended(peer, ours, 53, 0), false},
		"served on its address":               {begun(peer, ours, 4000, 0), false},
		"not served on its address":           {begun(peer, "198.51.100.2", 4000, 0), true},
		"from inside to a served port":        {begun("10.47.11.7", ours, 53, 0), true},
		"from inside, ended":                  {ended("10.47.11.7", ours, 53, 0), true},
		"expected, to a served port":          {begun(peer, ours, 53, cone.StatusExpected), true},
		"led inside":                          {begun(peer, ours, 5060, cone.StatusDstNAT), false},
		"led inside over IPv6":                {begun("2001:db8::5", "2001:db8::1", 5060, cone.StatusDstNAT), false},
		"led inside, to a served port":        {begun(peer, ours, 53, cone.StatusDstNAT), false},
		"led inside, ended, where no rule is": {ended(peer, ours, 53, cone.StatusDstNAT), true},
	} {
		if got := filtered(t, s)(tc.msg); got != tc.pass {
			t.Errorf("%s: passes is %v, want %v", name, got, tc.pass)
		}
	}
	for i := range uint16(mostServed) {
		s.Served = append(s.Served, at(ours, ours, 6000+i))
	}
	if filtered(t, s)(begun(peer, ours, 4000, 0)) {
		t.Error("with many sockets, the first one counts no more")
	}
}
