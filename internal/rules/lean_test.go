package rules_test

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// leaning learns, and lets Lean choose what is reported.
var leaning = func() rules.Desired {
	d, m := learning, *learning.Map
	m.Lean = true
	d.Map = &m
	return d
}()

// A reporter receives the events of a gateway.
type reporter struct {
	t *testing.T
	*ctwatch.Watcher
}

func newReporter(t *testing.T, l *lab.Lab) reporter {
	t.Helper()
	w, err := ctwatch.Dial(ctwatch.Config{NetNS: l.Gateway.FD()})
	check(t, err)
	t.Cleanup(func() { check(t, w.Close()) })
	return reporter{t, w}
}

// told returns the source ports of the flows that were reported so far. The kernel queues an
// event before the packet leaves.
func (r reporter) told(kind ctwatch.Kind) (ports []uint16) {
	r.t.Helper()
	check(r.t, r.SetReadDeadline(time.Unix(0, 1)))
	var events [64]ctwatch.Event
	for {
		n, err := r.Read(events[:])
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return ports
		}
		check(r.t, err)
		for _, e := range events[:n] {
			if e.Kind == kind {
				ports = append(ports, e.Flow.Src.Port)
			}
		}
	}
}

func (r reporter) tells(kind ctwatch.Kind, ports ...uint16) {
	r.t.Helper()
	got := r.told(kind)
	slices.Sort(got)
	if !slices.Equal(got, ports) {
		r.t.Errorf("%v: flows from ports %v, want %v", kind, got, ports)
	}
}

// While Lean is on the kernel does not report the beginning of a flow whose permission it
// learned, but still its end, and the beginning of other flows.
//
// Fails without the chain not_reported; when other flows reach it; and when it hides the end
// of a flow.
func TestLeanHidesWhatTheKernelLearned(t *testing.T) {
	g := newGate(t, lab.Options{}, leaning)
	r := newReporter(t, g.Lab)
	lean := g.tables.NewLean()
	check(t, lean.Off()) // it is off
	peer := g.peer(lab.PeerA, 5060)
	p := g.contact(g.inside(5060), peer)
	r.tells(ctwatch.New, 5060)

	check(t, lean.On())
	check(t, lean.On())
	q := g.contact(g.inside(5061), peer)
	r.tells(ctwatch.New)
	g.contact(g.inside(5062), g.peer(lab.PeerA, 53))   // an excluded port
	g.contact(g.inside(5063), g.peer(lab.PeerB, 5060)) // an excluded peer
	r.tells(ctwatch.New, 5062, 5063)
	g.holds(p, q)

	output(t, g.Lab, "conntrack", "-D", "-p", "udp", "--orig-port-src", "5061")
	r.tells(ctwatch.Gone, 5061)
	check(t, lean.Off())
	g.contact(g.inside(5064), peer)
	r.tells(ctwatch.New, 5064)
}

// A revoked permission returns with a new flow, which the daemon must hear of.
//
// Fails when flows that the daemon forbids to learn are hidden.
func TestLeanReportsWhatIsForbidden(t *testing.T) {
	g := newGate(t, lab.Options{}, leaning)
	r := newReporter(t, g.Lab)
	check(t, g.tables.NewLean().On())
	in := g.inside(5060)
	p := g.contact(in, g.peer(lab.PeerA, 5060))
	check(t, g.m.Deny([]cone.Permission{p}, cone.ReasonRevoked))
	g.contact(in, g.peer(lab.PeerA, 5061))
	r.tells(ctwatch.New, 5060)
	g.holds()
}

// If the outside port passes to another host, the daemon must hear of it: the host before may
// use other flows, and then the daemon restores its permission.
//
// Fails when such a flow ends in the chain not_reported.
func TestLeanReportsPortsThatPassToAnotherHost(t *testing.T) {
	g := newGate(t, lab.Options{Inside: 2}, leaning)
	r := newReporter(t, g.Lab)
	check(t, g.tables.NewLean().On())
	peer := g.peer(lab.PeerA, 5060)
	g.contact(g.inside(5060), peer)
	check(t, g.Flush())
	r.told(ctwatch.New)
	p := g.contact(listen(t, g.Inside(1), g.Inside(1).Addr, 5060), peer)
	r.tells(ctwatch.New, 5060)
	g.holds(p)
}

// Beyond the size of the map the daemon decides.
//
// Fails when a flow is hidden although its permission found no room.
func TestLeanReportsWhatFindsNoRoom(t *testing.T) {
	d, m := leaning, *leaning.Map
	m.Size = 1
	d.Map = &m
	g := newGate(t, lab.Options{}, d)
	r := newReporter(t, g.Lab)
	check(t, g.tables.NewLean().On())
	p := g.contact(g.inside(5060), g.peer(lab.PeerA, 5060))
	g.contact(g.inside(5061), g.peer(lab.PeerC, 5060))
	r.tells(ctwatch.New, 5061)
	g.holds(p)
}

// Nobody needs to hear of flows that can have no permission while only conenatd listens.
//
// Fails without the rules for TCP and for excluded ports, in the chain learn or in the chain
// quiet, when they do not look at the set, and when they hide other UDP flows.
func TestQuietHidesWhatCanHaveNoPermission(t *testing.T) {
	asked, byEvent, none := leaning, learning, learning
	asked.Quiet, byEvent.Quiet, none.Quiet = true, true, true
	m := *learning.Map
	m.Learn = false
	byEvent.Map, byEvent.ExcludePeerPorts = &m, m.ExcludePeerPorts
	none.Map, none.ExcludePeerPorts = nil, m.ExcludePeerPorts
	for name, test := range map[string]struct {
		d    rules.Desired
		port uint16 // an excluded outside port, or 0
	}{"lean": {leaning, 5066}, "learns": {asked, 5066}, "by event": {byEvent, 0}, "no map": {none, 0}} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{})
			tables := open(t, l)
			set(t, tables, test.d)
			r := newReporter(t, l)
			quiet := tables.NewQuiet()
			// udp begins flows from port to 5060, from port+1 to an excluded peer port, and from
			// an excluded outside port.
			udp := func(port uint16) {
				t.Helper()
				for from, to := range map[uint16]uint16{port: 5060, port + 1: 53, test.port: 5060} {
					if from == 0 {
						continue
					}
					in, peer := listen(t, l.Inside(0), l.Inside(0).Addr, from), listen(t, l.Outside, lab.PeerA, to)
					_, err := in.Contact(peer)
					check(t, errors.Join(err, in.Close(), peer.Close()))
				}
			}
			events := listenForEvents(t, l, unix.NFNLGRP_CONNTRACK_NEW)
			tcp := func() int {
				t.Helper()
				events.empty()
				check(t, l.Inside(0).Do(func() error {
					c, err := net.DialTimeout("tcp", netip.AddrPortFrom(lab.PeerA, 5060).String(), time.Minute)
					if err == nil {
						c.Close()
						return errors.New("somebody listens")
					}
					if !errors.Is(err, unix.ECONNREFUSED) {
						return err
					}
					return nil
				}))
				return events.empty()
			}
			all := func(port uint16) (ports []uint16) {
				if test.port != 0 {
					ports = append(ports, test.port)
				}
				return slices.Sorted(slices.Values(append(ports, port, port+1)))
			}
			for _, hide := range []bool{false, true, false} {
				port := uint16(5000)
				reported, connections := all(port), 1
				if hide {
					check(t, quiet.On())
					check(t, quiet.On())
					reported, connections = []uint16{port}, 0
				} else {
					check(t, quiet.Off())
				}
				udp(port)
				r.tells(ctwatch.New, reported...)
				if n := tcp(); n != connections {
					t.Errorf("hidden %v: %d reports of a connection, want %d", hide, n, connections)
				}
				check(t, l.Flush())
			}
			if test.port == 0 {
				tellsWhatComesFromOutside(t, l, r, quiet)
			}
		})
	}
}

// tellsWhatComesFromOutside checks that flows from outside to an inside host's port with the number
// of an excluded peer port are reported, though flows to such ports are not.
func tellsWhatComesFromOutside(t *testing.T, l *lab.Lab, r reporter, quiet *elements.Hidden) {
	t.Helper()
	check(t, l.NFT("table ip user { chain c { type nat hook prerouting priority dstnat; udp dport 5353 dnat to 10.47.11.109:53; }; }"))
	check(t, quiet.On())
	in, out := listen(t, l.Inside(0), l.Inside(0).Addr, 53), listen(t, l.Outside, lab.PeerA, 7000)
	check(t, out.Send(netip.MustParseAddrPort("198.51.100.1:5353"), "from outside"))
	_, err := in.Expect("from outside")
	check(t, err)
	r.tells(ctwatch.New, 7000)
}
