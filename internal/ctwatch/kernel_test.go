package ctwatch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// makeAnchor creates an entry as the expect backend does, and deletes it when
// remove is set.
func makeAnchor(t testing.TB, sport, dport uint16, remove bool) {
	t.Helper()
	c, err := conntrack.Dial(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	f := conntrack.NewFlow(unix.IPPROTO_UDP, conntrack.StatusConfirmed|conntrack.StatusAssured,
		netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("198.51.100.1"), sport, dport, 60, 0)
	if err := c.Create(f); err != nil {
		t.Fatalf("create anchor: %v", err)
	}
	if remove {
		if err := c.Delete(f); err != nil {
			t.Fatalf("delete anchor: %v", err)
		}
	}
}

// makeNoise makes entries that are no UDP flows: TCP and ICMP.
func makeNoise(t testing.TB) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	p, err := net.Dial("ip4:icmp", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p.Close() }()
	if _, err := p.Write([]byte{8, 0, 0xf7, 0xfd, 0, 1, 0, 1}); err != nil { // echo request
		t.Fatal(err)
	}
}

func TestWatcherHearsUDPFlowsBeginAndEnd(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "[::1]"} {
		t.Run(host, func(t *testing.T) {
			enterNetNS(t)
			w, q := dialWatcher(t, Config{}), dialQueries(t, Config{})
			s := listen(t, host+":0")
			peer := endpoint(host + ":9")
			s.send(t, peer, "x")
			ev := readOne(t, w)
			f := ev.Flow
			if ev.Kind != New || f.Src != s.endpoint() || f.Dst != peer || f.ReplySrc != peer || f.ReplyDst != s.endpoint() {
				t.Fatalf("event %+v", ev)
			}
			if !f.Status.Has(cone.StatusConfirmed) || f.ID == 0 {
				t.Errorf("status %#x, id %#x", f.Status, f.ID)
			}
			if ok, err := q.Delete(f.Src, f.Dst, 0, f.ID); !ok || err != nil {
				t.Fatalf("delete: %v, %v", ok, err)
			}
			if end := readOne(t, w); end.Kind != Gone || end.Flow.ID != f.ID || end.Flow.Src != f.Src {
				t.Errorf("event %+v", end)
			}
		})
	}
}

func TestSocketFilterDropsWhatIsNotOurs(t *testing.T) {
	enterNetNS(t)
	w := dialWatcher(t, Config{})
	makeNoise(t)
	makeAnchor(t, 0, 7, false)
	makeAnchor(t, 7, 0, true)
	// The kernel reports in the order in which things happen.
	s := listen(t, "127.0.0.1:0")
	s.send(t, endpoint("127.0.0.1:9"), "x")
	events := readQueued(t, w)
	if len(events) != 2 || events[0].Kind != Gone || !hasPortZero(&events[0].Flow) || events[0].Flow.Src.Port != 7 ||
		events[1].Kind != New || events[1].Flow.Src != s.endpoint() {
		t.Errorf("events %+v", events)
	}
	if st := w.Stats(); st.Filtered != 0 || st.Malformed != 0 || st.Received != 2 {
		t.Errorf("counters %+v: the socket filter let something pass", st)
	}
}

// lacksOptmem reports whether a socket has less memory for filters than the largest of them
// needs, as by default before Linux 6.8.
func lacksOptmem(t *testing.T) bool {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/core/optmem_max")
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	return n < 1<<16
}

// filtered returns what the filter with sources s lets pass.
func filtered(t *testing.T, s Sources) (passes func(msg []byte) bool) {
	t.Helper()
	// A socket pair runs the same filter on what the test writes.
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fds[0]); _ = unix.Close(fds[1]) })
	prog, err := eventFilter(s)
	if err != nil {
		t.Fatal(err)
	}
	filter := make([]unix.SockFilter, len(prog))
	for i, in := range prog {
		filter[i] = unix.SockFilter{Code: in.Op, Jt: in.Jt, Jf: in.Jf, K: in.K}
	}
	if err := unix.SetsockoptSockFprog(fds[0], unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
		&unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}); err != nil {
		t.Fatal(err)
	}
	return func(msg []byte) bool {
		if _, err := unix.Write(fds[1], msg); err != nil {
			t.Fatal(err)
		}
		_, err := unix.Read(fds[0], make([]byte, 1024))
		if err != nil && err != unix.EAGAIN {
			t.Fatal(err)
		}
		return err == nil
	}
}

func TestSocketFilterKeepsToItsSources(t *testing.T) {
	flow := func(src string, status cone.Status, more ...[]byte) []byte {
		a := netip.MustParseAddr(src)
		typ, dst := uint16(nfnl.CTAIPv4Src), attr(nfnl.CTAIPv4Dst, 192, 0, 2, 2)
		if a.Is6() {
			typ, dst = nfnl.CTAIPv6Src, attr(nfnl.CTAIPv6Dst, make([]byte, 16)...)
		}
		msg := newMsg(nest(nfnl.CTATupleOrig, nest(nfnl.CTATupleIP, attr(typ, a.AsSlice()...), dst), proto(17, 1, 2)),
			attr(nfnl.CTAStatus, binary.BigEndian.AppendUint32(nil, uint32(status|cone.StatusConfirmed))...), bytes.Join(more, nil))
		if a.Is6() {
			msg[unix.NLMSG_HDRLEN] = unix.AF_INET6
		}
		return msg
	}
	end := func(msg []byte) []byte {
		binary.NativeEndian.PutUint16(msg[4:], ctType(ipctnlMsgCTDelete))
		return msg
	}
	anchor := func(src string) []byte {
		return newMsg(nest(nfnl.CTATupleOrig, nest(nfnl.CTATupleIP, attr(nfnl.CTAIPv4Src, netip.MustParseAddr(src).AsSlice()...)), proto(17, 0, 2)),
			attr(nfnl.CTAStatus, 0, 0, 0, byte(cone.StatusConfirmed)))
	}
	prefixes := func(ps ...string) (all []netip.Prefix) {
		for _, p := range ps {
			all = append(all, netip.MustParsePrefix(p))
		}
		return all
	}
	several := prefixes("10.47.11.0/24", "2001:db8:47::/52", "192.168.0.0/23", "fd00::1/128", "172.16.9.9/32")
	for _, tt := range []struct {
		name    string
		msg     []byte
		sources []netip.Prefix
		pass    bool
	}{
		{"from inside", flow("10.47.11.255", cone.StatusSrcNAT), several, true},
		{"from inside, not translated", flow("192.168.1.7", 0), several, true},
		{"from one host", flow("172.16.9.9", 0), several, true},
		{"beside the prefix", flow("10.47.12.0", cone.StatusSrcNAT), several, false},
		{"beside the host", flow("172.16.9.8", 0), several, false},
		{"from inside over IPv6", flow("2001:db8:47:fff::1", 0), several, true},
		{"beside the prefix over IPv6", flow("2001:db8:47:1000::1", 0), several, false},
		{"from one host over IPv6", flow("fd00::1", 0), several, true},
		{"beside the host over IPv6", flow("fd00::2", 0), several, false},
		{"from outside to the gateway", flow("203.0.113.5", 0), several, false},
		{"from outside, ended", end(flow("203.0.113.5", 0)), several, false},
		{"from inside, ended", end(flow("10.47.11.7", cone.StatusSrcNAT)), several, true},
		{"led inside", flow("203.0.113.5", cone.StatusDstNAT), several, true},
		{"led inside, ended", end(flow("203.0.113.5", cone.StatusDstNAT)), several, true},
		{"expected", flow("203.0.113.5", cone.StatusExpected), several, true},
		{"with a helper", flow("203.0.113.5", 0, attr(nfnl.CTAHelp)), several, true},
		{"an anchor", anchor("10.47.11.7"), several, false},
		{"an anchor that ended", end(anchor("10.47.11.7")), several, true},
		{"no status", newMsg(tuples), several, true},
		{"no address", newMsg(nest(nfnl.CTATupleOrig, proto(17, 1, 2)), attr(nfnl.CTAStatus, 0, 0, 0, 8)), several, true},
		{"all are enabled", flow("203.0.113.5", 0), prefixes("0.0.0.0/0"), true},
		{"no prefix of the family", flow("2001:db8::1", 0), prefixes("10.0.0.0/8"), false},
		{"no prefix at all", flow("203.0.113.5", 0), nil, true},
		{"too many prefixes", flow("203.0.113.5", 0), slices.Repeat(prefixes("10.0.0.0/8"), mostSources+1), true},
		{"many", flow("203.0.113.5", 0), slices.Repeat(prefixes("10.0.0.0/8", "2001:db8::/64"), 20), false},
	} {
		for _, labelled := range []bool{false, true} {
			// Only this one of the cases above depends on Labelled.
			want := tt.pass && !(labelled && tt.name == "led inside")
			if pass := filtered(t, Sources{Prefixes: tt.sources, Labelled: labelled})(tt.msg); pass != want {
				t.Errorf("%s, labelled is %v: passes is %v, want %v", tt.name, labelled, pass, want)
			}
		}
	}
	label := attr(nfnl.CTALabels, make([]byte, 16)...)
	for name, msg := range map[string][]byte{
		"led inside with a label":           flow("203.0.113.5", cone.StatusDstNAT, label),
		"expected and led inside":           flow("203.0.113.5", cone.StatusDstNAT|cone.StatusExpected),
		"led elsewhere from inside":         flow("10.47.11.7", cone.StatusDstNAT),
		"led inside with a helper":          flow("203.0.113.5", cone.StatusDstNAT, attr(nfnl.CTAHelp)),
		"led inside over IPv6 with a label": flow("2001:db8::5", cone.StatusDstNAT, label),
	} {
		if !filtered(t, Sources{Prefixes: several, Labelled: true})(msg) {
			t.Errorf("%s: does not pass", name)
		}
	}
}

// ended is the event of the end of a flow.
func ended(src, dst string, port uint16, status cone.Status) []byte {
	s, d, typ := netip.MustParseAddr(src), netip.MustParseAddr(dst), uint16(nfnl.CTAIPv4Src)
	if s.Is6() {
		typ = nfnl.CTAIPv6Src
	}
	msg := newMsg(nest(nfnl.CTATupleOrig, nest(nfnl.CTATupleIP, attr(typ, s.AsSlice()...), attr(typ+1, d.AsSlice()...)), proto(17, 9, port)),
		attr(nfnl.CTAStatus, binary.BigEndian.AppendUint32(nil, uint32(status))...))
	binary.NativeEndian.PutUint16(msg[4:], ctType(ipctnlMsgCTDelete))
	if msg[unix.NLMSG_HDRLEN] = unix.AF_INET; s.Is6() {
		msg[unix.NLMSG_HDRLEN] = unix.AF_INET6
	}
	return msg
}

// A user's forward may lead a flow of an enabled host too.
func TestSocketFilterLeavesOutTheEndsOfForwardedFlows(t *testing.T) {
	addrs := func(first, last string, ports ...uint16) Range {
		return Range{FirstAddr: netip.MustParseAddr(first), LastAddr: netip.MustParseAddr(last), FirstPort: ports[0], LastPort: ports[1]}
	}
	from := func(first, last string, r Range) Range {
		r.FirstSource, r.LastSource = netip.MustParseAddr(first), netip.MustParseAddr(last)
		return r
	}
	some := []Range{
		addrs("198.51.100.1", "198.51.100.1", 5000, 5009), addrs("198.51.100.8", "198.51.100.15", 0, 0xffff),
		addrs("0.0.0.0", "255.255.255.255", 53, 53), addrs("198.51.100.1", "198.51.100.1", 443, 443),
		from("203.0.113.16", "203.0.113.31", addrs("198.51.100.1", "198.51.100.1", 6000, 6000)),
	}
	const ours, peer, led = "198.51.100.1", "203.0.113.5", cone.StatusDstNAT
	for name, tc := range map[string]struct {
		msg  []byte
		pass bool
	}{
		"the first port":             {ended(peer, ours, 5000, led), false},
		"the last port":              {ended(peer, ours, 5009, led), false},
		"one port":                   {ended(peer, ours, 443, led), false},
		"below the ports":            {ended(peer, ours, 4999, led), true},
		"above the ports":            {ended(peer, ours, 5010, led), true},
		"a port of another address":  {ended(peer, "198.51.100.2", 5000, led), true},
		"the first address":          {ended(peer, "198.51.100.8", 1, led), false},
		"the last address":           {ended(peer, "198.51.100.15", 65535, led), false},
		"below the addresses":        {ended(peer, "198.51.100.7", 1, led), true},
		"above the addresses":        {ended(peer, "198.51.100.16", 1, led), true},
		"a port of all addresses":    {ended(peer, "9.9.9.9", 53, led), false},
		"the first source":           {ended("203.0.113.16", ours, 6000, led), false},
		"the last source":            {ended("203.0.113.31", ours, 6000, led), false},
		"below the sources":          {ended("203.0.113.15", ours, 6000, led), true},
		"above the sources":          {ended("203.0.113.32", ours, 6000, led), true},
		"a source, another port":     {ended("203.0.113.16", ours, 6001, led), true},
		"a source, another address":  {ended("203.0.113.16", "198.51.100.2", 6000, led), true},
		"from inside":                {ended("10.47.11.7", "9.9.9.9", 53, led), true},
		"expected":                   {ended(peer, ours, 5000, led|cone.StatusExpected), true},
		"over IPv6":                  {ended("2001:db8::1", "2001:db8::2", 53, led), false},
		"expected, over IPv6":        {ended("2001:db8::1", "2001:db8::2", 53, led|cone.StatusExpected), true},
		"from inside, over IPv6":     {ended("2001:db8:47::1", "2001:db8::2", 53, led), true},
		"from outside, not led away": {ended(peer, ours, 4999, 0), false},
	} {
		s := Sources{Prefixes: []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24"), netip.MustParsePrefix("2001:db8:47::/48")}, Labelled: true, Forwarded: some}
		if got := filtered(t, s)(tc.msg); got != tc.pass {
			t.Errorf("%s: passes is %v, want %v", name, got, tc.pass)
		}
		if lacksOptmem(t) {
			continue
		}
		s.Forwarded = slices.Repeat(some, mostForwarded/len(some))
		if got := filtered(t, s)(tc.msg); got != tc.pass {
			t.Errorf("%s, with the most: passes is %v, want %v", name, got, tc.pass)
		}
		s.Forwarded = append(s.Forwarded, some[0])
		if got := filtered(t, s)(tc.msg); got != tc.pass {
			t.Errorf("%s, with more than are compared: passes is %v, want %v", name, got, tc.pass)
		}
	}
}

func TestWatcherHearsOfItsSourcesAlone(t *testing.T) {
	enterNetNS(t)
	w := dialWatcher(t, Config{})
	a, b := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.2:0")
	for _, sources := range [][]netip.Prefix{{netip.MustParsePrefix("127.0.0.1/32")}, nil} {
		if err := w.SetSources(Sources{Prefixes: sources}); err != nil {
			t.Fatal(err)
		}
		peer := endpoint(fmt.Sprintf("127.0.0.1:%d", 9+len(sources)))
		b.send(t, peer, "x")
		a.send(t, peer, "x")
		events := readQueued(t, w)
		if len(events) != 2-len(sources) || events[len(events)-1].Flow.Src != a.endpoint() {
			t.Errorf("with %v: %+v", sources, events)
		}
	}
}

// If the kernel has no memory for the new filter, there is none: the old one is gone
// already.
//
// Fails when SetSources only returns an error.
func TestWatcherHearsOfAllWithMoreSourcesThanTheKernelTakes(t *testing.T) {
	enterNetNS(t)
	// As it was up to Linux 6.7, for all namespaces.
	if err := os.WriteFile("/proc/sys/net/core/optmem_max", []byte("20480"), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	w := dialWatcher(t, Config{})
	a, b := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.2:0")
	few, many := []netip.Prefix{netip.MustParsePrefix("127.0.0.2/32")}, slices.Repeat([]netip.Prefix{netip.MustParsePrefix("2001:db8::/128")}, mostSources)
	var ranges []Range // of which less than all are compared
	for i := range byte(200) {
		a, from := netip.AddrFrom4([4]byte{198, 51, 100, i}), netip.AddrFrom4([4]byte{203, 0, 113, i})
		ranges = append(ranges, Range{FirstAddr: a, LastAddr: a}, Range{FirstAddr: a, LastAddr: a, FirstSource: from, LastSource: from})
	}
	for i, sources := range []Sources{
		{Prefixes: slices.Repeat(few, mostSources), Labelled: true, Forwarded: ranges},
		{Prefixes: many},
	} {
		if err := w.SetSources(sources); err != nil {
			t.Fatal(err)
		}
		peer := endpoint(fmt.Sprintf("127.0.0.1:%d", 9+i))
		a.send(t, peer, "x")
		b.send(t, peer, "x")
		if n := len(readQueued(t, w)); n != 1+i {
			t.Errorf("with %d ranges: %d events, want %d", len(sources.Forwarded), n, 1+i)
		}
	}
}

func TestSocketFilterPassesWhatItDoesNotKnow(t *testing.T) {
	passes := filtered(t, Sources{})
	udp := attr(nfnl.CTAProtoNum, 17)
	for _, tt := range []struct {
		name string
		msg  []byte
		pass bool
	}{
		{"UDP", newMsg(tuples), true},
		{"UDP behind other attributes", newMsg(attr(nfnl.CTAMark, 1, 2, 3, 4), tuples), true},
		{"no original tuple", newMsg(nest(nfnl.CTATupleReply, ip4, proto(6, 1, 2))), true},
		{"no protocol nest", newMsg(nest(nfnl.CTATupleOrig, ip4)), true},
		{"no protocol number", newMsg(nest(nfnl.CTATupleOrig, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoSrcPort, 0, 0)))), true},
		{"no ports", newMsg(nest(nfnl.CTATupleOrig, nest(nfnl.CTATupleProto, udp))), true},
		{"no attributes", newMsg(), true},
		{"port whose low byte is 0", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 0x0100, 0x0001))), true},
		{"TCP", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(6, 1, 2))), false},
		{"ICMP", newMsg(nest(nfnl.CTATupleOrig, ip4, nest(nfnl.CTATupleProto, attr(nfnl.CTAProtoNum, 1)))), false},
		{"source port 0", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 0, 2))), false},
		{"destination port 0", newMsg(nest(nfnl.CTATupleOrig, ip4, proto(17, 1, 0))), false},
	} {
		if pass := passes(tt.msg); pass != tt.pass {
			t.Errorf("%s: passes is %v, want %v", tt.name, pass, tt.pass)
		}
	}
}

func TestWatcherTellsOfAnOverrunAndGoesOn(t *testing.T) {
	enterNetNS(t)
	w := dialWatcher(t, Config{ReadBuffer: 1}) // the kernel's least
	s := listen(t, "127.0.0.1:0")
	const sent = 200
	for port := range sent {
		s.send(t, endpoint(fmt.Sprintf("127.0.0.1:%d", 1000+port)), "x")
	}
	events := readQueued(t, w)
	n := len(events) - 1
	if n < 0 || n >= sent || events[n] != (Event{Kind: Overrun}) {
		t.Fatalf("%d events, the last is %+v", len(events), events[max(n, 0)])
	}
	for i, ev := range events[:n] {
		if ev.Kind != New {
			t.Errorf("event %d: %+v", i, ev)
		}
	}
	if st := w.Stats(); st.Overruns != 1 || st.Received != uint64(n) {
		t.Errorf("counters %+v, %d events", st, n)
	}
	// The kernel must deliver again when the overrun is reported.
	s.send(t, endpoint("127.0.0.1:2000"), "x")
	if ev := readOne(t, w); ev.Kind != New || ev.Flow.Dst.Port != 2000 {
		t.Errorf("event after the overrun: %+v", ev)
	}
}

func TestReceiveBufferExceedsTheSysctl(t *testing.T) {
	enterNetNS(t)
	if got := dialWatcher(t, Config{}).Stats().ReadBuffer; got != DefaultReadBuffer {
		t.Errorf("receive buffer %d, want %d", got, DefaultReadBuffer)
	}
	if got := dialWatcher(t, Config{ReadBuffer: 1 << 20}).Stats().ReadBuffer; got != 1<<20 {
		t.Errorf("receive buffer %d, want %d", got, 1<<20)
	}
}

func TestConfigNamesANetworkNamespace(t *testing.T) {
	enterNetNS(t)
	ns, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Close() }()
	type pair struct {
		w    *Watcher
		q    *Queries
		errs error
	}
	c := make(chan pair)
	go func() { // this goroutine runs in the namespace of the process
		cfg := Config{NetNS: int(ns.Fd())}
		w, werr := Dial(cfg)
		q, qerr := DialQueries(cfg)
		c <- pair{w, q, errors.Join(werr, qerr)}
	}()
	p := <-c
	if p.errs != nil {
		t.Fatal(p.errs)
	}
	defer func() { _ = p.w.Close(); _ = p.q.Close() }()
	s := listen(t, "127.0.0.1:0")
	s.send(t, endpoint("127.0.0.1:9"), "x")
	if ev := readOne(t, p.w); ev.Flow.Src != s.endpoint() {
		t.Errorf("event %+v", ev)
	}
	if flows := dump(t, p.q); len(flows) != 1 {
		t.Errorf("dump %v", flows)
	}
}

func TestDialWithoutPrivilegeSaysWhatMendsIt(t *testing.T) {
	enterNetNS(t)
	// Capabilities are the thread's, and the thread ends with the test.
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if err := unix.Capset(&hdr, &none[0]); err != nil {
		t.Fatal(err)
	}
	_, err := Dial(Config{})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("Dial: %v", err)
	}
	q := dialQueries(t, Config{})
	err = q.Dump(func(*cone.Flow) {})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Errorf("Dump: %v", err)
	}
}
