package selftest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A verdict is the result for one requirement.
type verdict string

const (
	pass          verdict = "pass"
	fail          verdict = "fail"
	notApplicable verdict = "n/a"
)

func verdictOf(ok bool) verdict {
	if ok {
		return pass
	}
	return fail
}

// A configuration is one for the daemon, or a gateway without it.
type configuration struct {
	name string
	file string // for "conenatd run"; if empty, no daemon runs
}

// subnet returns a [[subnet]] table of a configuration file.
func subnet(prefix netip.Prefix, more ...string) string {
	return fmt.Sprintf("[[subnet]]\nprefix = %q\n%s\n", prefix, strings.Join(more, "\n"))
}

const (
	routed = "routed = true"
	open   = `filtering = "endpoint_independent"`
	mapped = `mapping = "endpoint_independent"`
)

var configurations = []configuration{
	{"stock Linux, masquerade, without conenatd", ""},
	{"conenatd as it is", subnet(lab.InsideNet) + subnet(lab.InsideNet6, routed)},
	{"conenatd, filtering = endpoint_independent", subnet(lab.InsideNet, open) + subnet(lab.InsideNet6, routed)},
	{"conenatd, mapping = endpoint_independent, hairpin = true", "hairpin = true\n" + subnet(lab.InsideNet, mapped) + subnet(lab.InsideNet6, routed)},
}

// A requirement is one of RFC 4787, or a recommendation of RFC 6092 about UDP. try
// runs it in a fresh lab and returns what it saw; an attempt that ends means that the test
// itself failed.
type requirement struct {
	name, title string
	opts        lab.Options
	try         func(*stage) (verdict, string)
}

var requirements = []requirement{
	{name: "REQ-1", title: "endpoint-independent mapping", opts: lab.Options{Inside: 2}, try: (*stage).mapping},
	{name: "REQ-2", title: "paired address pooling", try: never("the gateway has one outside address")},
	{name: "REQ-3", title: "no port overloading", opts: lab.Options{Inside: 2}, try: (*stage).overloading},
	{name: "REQ-3a", title: "ports below 1024 stay below", try: (*stage).portRange},
	{name: "REQ-4", title: "port parity", try: (*stage).parity},
	{name: "REQ-5", title: "mapping holds two minutes", try: (*stage).timer},
	{name: "REQ-6", title: "packets from inside refresh", try: (*stage).refresh},
	{name: "REQ-7", title: "inside addresses that are outside too", try: never("the inside addresses are the administrator's")},
	{name: "REQ-8", title: "filtering by address at most", try: (*stage).filtering},
	{name: "REQ-9", title: "hairpinning, with the outside source", opts: lab.Options{Inside: 2}, try: (*stage).hairpin},
	{name: "REQ-10", title: "application level gateways off", try: (*stage).gateways},
	{name: "REQ-11", title: "deterministic", opts: lab.Options{Inside: 2}, try: (*stage).mapping},
	{name: "REQ-12", title: "ICMP errors pass and end no mapping", try: (*stage).icmp},
	{name: "REQ-13", title: "fragments go out", try: (*stage).fragmentsOut},
	{name: "REQ-14", title: "fragments come in, out of order too", try: (*stage).fragmentsIn},
	{name: "RFC 6092 REC-11", title: "IPv6: filtering by address at most", opts: lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy}, try: (*stage).filtering6},
	{name: "RFC 6092 REC-14", title: "IPv6: a flow holds two minutes", opts: lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy}, try: (*stage).timer6},
}

// RFC4787 tests the requirements of RFC 4787, and those of RFC 6092 about UDP, in
// each configuration of the program exe, and writes a line for each. The error is
// ErrFailed if a test could not be run.
func RFC4787(w io.Writer, exe string) error {
	var failed error
	for _, c := range configurations {
		fmt.Fprintf(w, "%s:\n", c.name)
		for _, r := range requirements {
			v, what, err := r.look(exe, c)
			if errors.Is(err, lab.ErrPrivilege) {
				return err
			}
			if err != nil {
				v, what, failed = fail, "could not be tried: "+oneLine(err), ErrFailed
			}
			fmt.Fprintf(w, "  %-4s  %s %s: %s\n", v, r.name, r.title, what)
		}
	}
	return failed
}

func (r *requirement) look(exe string, c configuration) (v verdict, what string, err error) {
	err = onStage(r.opts, exe, nil, func(s *stage) {
		if c.file != "" {
			file := get(os.CreateTemp("", "conenatd-*.toml"))
			defer os.Remove(file.Name())
			_, err := file.WriteString(c.file)
			must(errors.Join(err, file.Close()))
			s.args = []string{"--config", file.Name()}
			s.start()
		}
		v, what = r.try(s)
	})
	return v, what, err
}

func never(why string) func(*stage) (verdict, string) {
	return func(*stage) (verdict, string) { return notApplicable, why }
}

// clash lets two inside hosts send from the same source port to three peers, so
// that the kernel cannot always keep the port, and returns the outside endpoints of
// each host.
func (s *stage) clash() (seen [2][]netip.AddrPort) {
	const port = 3074
	hosts := []*lab.Socket{s.inside(0, port), s.inside(1, port)}
	var peers []*lab.Socket
	for _, a := range []netip.Addr{lab.PeerA, lab.PeerB, lab.PeerC} {
		peers = append(peers, s.open(s.Outside, a, port))
	}
	for _, step := range [][2]int{{0, 0}, {1, 1}, {1, 0}, {0, 1}, {0, 2}, {1, 2}} {
		seen[step[0]] = append(seen[step[0]], get(hosts[step[0]].Contact(peers[step[1]])))
	}
	return seen
}

func (s *stage) mapping() (verdict, string) {
	seen := s.clash()
	ok := true
	for _, exts := range seen {
		for _, e := range exts {
			ok = ok && e == exts[0]
		}
	}
	return verdictOf(ok), fmt.Sprintf("two hosts on one port leave as %v and %v", seen[0], seen[1])
}

func (s *stage) overloading() (verdict, string) {
	seen := s.clash()
	for _, e := range seen[0] {
		if slices.Contains(seen[1], e) {
			return fail, fmt.Sprintf("two hosts share %v", e)
		}
	}
	return pass, fmt.Sprintf("two hosts leave as %v and %v", seen[0], seen[1])
}

// leaves returns the outside port that the kernel gives an inside port.
func (s *stage) leaves(port uint16) uint16 {
	return get(s.inside(0, port).Contact(s.open(s.Outside, lab.PeerA, port))).Port()
}

func (s *stage) portRange() (verdict, string) {
	low, high := s.leaves(600), s.leaves(40000)
	return verdictOf(low < 1024 && high >= 1024), fmt.Sprintf("600 leaves as %d, 40000 as %d", low, high)
}

func (s *stage) parity() (verdict, string) {
	even, odd := s.leaves(5004), s.leaves(5005)
	return verdictOf(even%2 == 0 && odd%2 == 1), fmt.Sprintf("5004 leaves as %d, 5005 as %d", even, odd)
}

func (s *stage) timer() (verdict, string)  { return s.outlives(s.cast()) }
func (s *stage) timer6() (verdict, string) { return s.outlives(s.cast6()) }

// outlives deletes the flow, as the kernel does after nf_conntrack_udp_timeout.
func (s *stage) outlives(c cast) (verdict, string) {
	ext := c.contact()
	timeout := get(s.Gateway.Sysctl("net.netfilter.nf_conntrack_udp_timeout"))
	family := "ipv4"
	if ext.Addr().Is6() {
		family = "ipv6"
	}
	s.stands(ext)
	get(s.Gateway.Output("conntrack", "-D", "-f", family, "-p", "udp", "--orig-port-src", "5060", "--orig-port-dst", "5060"))
	arrived, how := s.reaches(c.device, c.proxy, ext), "lost"
	if arrived {
		how = "let in"
	}
	return verdictOf(arrived), fmt.Sprintf("the kernel forgets an unanswered flow after %s s; then its peer is %s", timeout, how)
}

// stands waits until the daemon, if one runs, lists a standing permission for ext.
func (s *stage) stands(ext netip.AddrPort) {
	if s.d == nil {
		return
	}
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); {
		found := false
		must(control.Dial(s.d.Socket).Permissions(context.Background(), func(p control.Permission) error {
			found = found || p.Ext == ext && p.State == "standing"
			return nil
		}))
		if found {
			return
		}
	}
	must(fmt.Errorf("no permission stands for %v", ext))
}

// reaches reports whether a packet of from to ext gets to device. The fence comes
// from a peer of its own.
func (s *stage) reaches(device, from *lab.Socket, ext netip.AddrPort) bool {
	addr := netip.MustParseAddr("203.0.113.7")
	if ext.Addr().Is6() {
		addr = netip.MustParseAddr("2001:db8:5::7")
	}
	fence := get(s.Outside.Socket(addr, 7))
	defer fence.Close()
	back := get(device.Contact(fence))
	err := lab.Lost(device,
		lab.Packet{From: from, To: ext, Payload: "from " + from.Addr().String()},
		lab.Packet{From: fence, To: back, Payload: "fence after " + from.Addr().String()})
	if errors.Is(err, lab.ErrArrived) {
		return true
	}
	must(err)
	return false
}

func (s *stage) refresh() (verdict, string) {
	c := s.cast()
	c.contact()
	flow := []string{"-p", "udp", "--orig-src", c.device.Addr().Addr().String(), "--orig-port-src", "5060", "--orig-port-dst", "5060"}
	left := func() (n int) {
		out, err := s.Conntrack(flow...)
		if err != nil || len(out) == 0 {
			must(errors.Join(err, errors.New("the flow is gone")))
		}
		get(fmt.Sscanf(out[0], "udp 17 %d", &n))
		return n
	}
	get(s.Gateway.Output("conntrack", append([]string{"-U", "--timeout", "9"}, flow...)...))
	before := left()
	c.contact()
	after := left()
	return verdictOf(after > before), fmt.Sprintf("%d s left, %d after a packet", before, after)
}

func (s *stage) filtering() (verdict, string)  { return s.filters(s.cast()) }
func (s *stage) filtering6() (verdict, string) { return s.filters(s.cast6()) }

func (s *stage) filters(c cast) (verdict, string) {
	ext := c.contact()
	s.stands(ext)
	same, anybody := s.reaches(c.device, c.other, ext), s.reaches(c.device, c.stranger, ext)
	switch {
	case anybody:
		return pass, "endpoint-independent: anybody is let in"
	case same:
		return pass, "address-dependent: the peer is let in from any port, nobody else"
	}
	return fail, "address and port-dependent: the peer is let in from one port"
}

// hairpin lets one inside host send to the outside endpoint of another.
func (s *stage) hairpin() (verdict, string) {
	c, second := s.cast(), s.inside(1, 5062)
	ext, extSecond := c.contact(), get(second.Contact(c.proxy))
	must(second.Send(ext, "hairpin"))
	// The first packet got through before Send returned; if none did, the fence
	// comes next.
	must(c.proxy.Send(ext, "fence"))
	got, from, err := c.device.Recv(10 * time.Second)
	must(err)
	if got != "hairpin" {
		return fail, fmt.Sprintf("what an inside host sends to %v is lost", ext)
	}
	return verdictOf(from == extSecond), fmt.Sprintf("it arrives from %v, the sender's outside endpoint is %v", from, extSecond)
}

func (s *stage) gateways() (verdict, string) {
	on, err := s.Gateway.Sysctl("net.netfilter.nf_conntrack_helper")
	if errors.Is(err, os.ErrNotExist) {
		return pass, "this kernel assigns none by itself"
	}
	must(err)
	return verdictOf(on == "0"), "net.netfilter.nf_conntrack_helper is " + on
}
