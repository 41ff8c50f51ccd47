package gateway_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestWatcherHearsOfLinksAddressesAndRoutes(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	w, err := gateway.Watch(l.Gateway.FD())
	if err != nil {
		t.Fatal(err)
	}
	for _, change := range [][]string{
		{"address", "add", "198.51.100.77/32", "dev", "wan0"},
		{"address", "del", "198.51.100.77/32", "dev", "wan0"},
		{"route", "add", "192.0.2.128/25", "via", "198.51.100.254", "table", "77"},
		{"link", "add", "lan9", "type", "bridge"},
		{"-6", "address", "add", "2001:db8:9::1/64", "dev", "lan9", "nodad"},
	} {
		heard := make(chan error, 1)
		go func() { heard <- w.Wait() }()
		if _, err := l.Gateway.Output("ip", change...); err != nil {
			t.Fatal(err)
		}
		if err := <-heard; err != nil {
			t.Errorf("%q: %v", change, err)
		}
	}
	heard := make(chan error, 1)
	go func() { heard <- w.Wait() }()
	if err := w.Close(); err != nil {
		t.Error(err)
	}
	if err := <-heard; !errors.Is(err, os.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

// A nexthop object that routes use leads elsewhere. The kernel says nothing of these routes if it names
// no links in them.
//
// Fails when nexthop objects are not watched.
func TestWatcherHearsOfNexthops(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	w, run := watching(t, l)
	if err := l.Gateway.SetSysctl("net.ipv4.nexthop_compat_mode", "0"); err != nil {
		t.Fatal(err)
	}
	run("nexthop add id 7 via 198.51.100.254 dev wan0")
	run("route add default nhid 7 table 100")
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	n, err := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{})
	if err != nil {
		t.Fatal(err)
	}
	w.Know(n, nil, false)
	run("nexthop replace id 7 via 10.47.11.109 dev lan0")
	if err := heardOf(w); err != nil {
		t.Error(err)
	}
}

// Status tells whether links to subnets and outside links run, also without mappings.
//
// Fails when a carrier that goes or comes is not heard of.
func TestWatcherHearsOfCarriers(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Inside: 1})
	w, _ := watching(t, l)
	for _, state := range []string{"down", "up"} {
		for link, host := range map[string]*lab.Host{"lan0": l.Inside(0), "wan0": l.Outside} {
			n, err := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{Subnets: []netip.Prefix{lab.InsideNet}})
			if err != nil {
				t.Fatal(err)
			}
			w.Know(n, nil, false)
			if _, err := host.Output("ip", "link", "set", "eth0", state); err != nil {
				t.Fatal(err)
			}
			if err := heardOf(w); err != nil {
				t.Errorf("%s %s: %v", link, state, err)
			}
		}
	}
}

// heardOf waits until the Watcher reports something.
func heardOf(w *gateway.Watcher) error {
	heard := make(chan error, 1)
	go func() { heard <- w.Wait() }()
	select {
	case err := <-heard:
		return err
	case <-time.After(time.Minute):
		return errors.New("was not heard of")
	}
}

// watching returns a Watcher of the gateway, and a function that runs ip there.
func watching(t *testing.T, l *lab.Lab) (w *gateway.Watcher, run func(args string)) {
	t.Helper()
	w, err := gateway.Watch(l.Gateway.FD())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w, func(args string) {
		t.Helper()
		if _, err := l.Gateway.Output("ip", strings.Fields(args)...); err != nil {
			t.Fatal(err)
		}
	}
}

// A Watcher that knows the Network reports only what changes an answer: a route or a link
// that changes all the time costs nothing.
func TestWatcherPassesOverWhatChangesNoAnswer(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true})
	w, run := watching(t, l)
	know := func(named ...string) gateway.Network {
		t.Helper()
		n, err := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{Outside: named})
		if err != nil {
			t.Fatal(err)
		}
		w.Know(n, named, false)
		return n
	}
	run("link add idle0 type bridge")
	run("link add busy0 type bridge")
	run("addr add 10.48.0.1/24 dev busy0")
	run("link set busy0 up")
	run("link add fw0 type bridge")
	run("link add fwa0 master fw0 type veth peer name fwb0")
	if err := w.Wait(); err != nil { // of all that was before
		t.Fatal(err)
	}
	for i, test := range []struct {
		named   string
		change  string
		matters bool
	}{
		{"", "route add 192.0.2.0/25 via 198.51.100.254", false},
		{"", "route add 192.0.2.128/25 via 198.51.100.254 table 77", false},
		{"", "route del 192.0.2.0/25", false},
		{"", "-6 route add 2001:db8:77::/48 dev wan0", false},
		{"", "link set idle0 up", false},
		{"", "link set idle0 down", false},
		{"", "link add other0 type bridge", false},
		{"", "link del other0", false},
		{"", "link set fwb0 master idle0", true}, // the first port of a bridge without an address
		{"", "link add port0 master idle0 type veth peer name port1", false},
		{"", "link del port0", false},
		{"", "link set fwb0 master lan0", true}, // now its hosts come by the bridge fw0
		{"", "link add other0 type veth peer name other1", false},
		{"", "link del other0", false},
		{"", "link set fwb0 nomaster", true},
		{"", "-6 rule add fwmark 7 lookup 100", true}, // it hides the way back
		{"", "-6 rule del fwmark 7 lookup 100", true},
		{"", "nexthop add id 7 via 198.51.100.254 dev wan0", false}, // no route uses it
		{"", "route add default nhid 7 table 100", true},
		{"", "nexthop del id 7", true}, // the route goes without a word
		{"", "addr change 10.48.0.1/24 dev busy0 valid_lft 1000 preferred_lft 1000", true},
		{"", "addr change 10.48.0.1/24 dev busy0 valid_lft 2000 preferred_lft 2000", false}, // a renewed lease
		{"", "route add 10.99.0.0/16 via 10.47.11.109", true},
		{"", "route add 10.99.1.0/24 via 198.51.100.254", true}, // within one by another link
		{"", "route del 10.99.1.0/24", true},
		{"", "route del 10.99.0.0/16", true},
		{"", "route add unreachable 10.99.0.0/16", false},
		{"", "link set busy0 down", true}, // its routes go without a word
		{"", "link set busy0 up", true},
		{"", "addr add 10.48.1.1/24 dev busy0", true},
		{"", "addr del 10.48.1.1/24 dev busy0", true},
		{"", "link set idle0 name idle1", false},
		{"", "link set fw0 name fw1", true}, // a bridge with a port, and without an address
		{"", "link del fw1", true},
		{"uplink9", "link add uplink9 type bridge", true},
		{"uplink9", "link del uplink9", true},
		{"", "link del busy0", true},
		{"", "route del default", true},
		{"", "route add 192.0.2.0/24 via 198.51.100.254", true}, // no default covers it
		{"", "route add 0.0.0.0/1 via 198.51.100.254", true},
	} {
		named := strings.Fields(test.named)
		before := know(named...)
		heard := make(chan error, 1)
		go func() { heard <- w.Wait() }()
		run(test.change)
		after, _ := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{Outside: named})
		if !test.matters {
			if a, b := before.Topology(), after.Topology(); !slices.Equal(a.Local, b.Local) || !slices.Equal(before.OutsideLinks(), after.OutsideLinks()) {
				t.Errorf("%q changed an answer", test.change)
			}
			// The next change is reported, so the first one was skipped.
			select {
			case err := <-heard:
				t.Errorf("%q was heard of: %v", test.change, err)
				continue
			case <-time.After(50 * time.Millisecond): // longer than it settles
			}
			run(fmt.Sprintf("addr add 10.49.%d.1/24 dev lan0", i))
		}
		select {
		case err := <-heard:
			if err != nil {
				t.Errorf("%q: %v", test.change, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%q was not heard of", test.change)
		}
	}
}

// Routes by a link that only a NAT rule makes an outside link matter, also beside a default
// route.
//
// Fails when the default route covers them.
func TestWatcherHearsOfTheRoutesOfAnUplink(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	w, run := watching(t, l)
	for _, args := range []string{"link add vpn0 type bridge", "addr add 10.66.0.2/24 dev vpn0", "link set vpn0 up", "route add 192.0.2.0/25 via 10.66.0.1"} {
		run(args)
	}
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	for _, change := range []string{"route add 192.0.2.128/25 via 10.66.0.1", "route del 192.0.2.128/25", "route del 192.0.2.0/25"} {
		n, err := gateway.ReadNetwork(l.Gateway.FD(), gateway.Sides{RuledNAT: []string{"vpn0"}})
		if err != nil || !slices.Contains(n.OutsideLinks(), "vpn0") {
			t.Fatal(n.OutsideLinks(), err)
		}
		w.Know(n, nil, false)
		heard := make(chan error, 1)
		go func() { heard <- w.Wait() }()
		run(change)
		select {
		case err := <-heard:
			if err != nil {
				t.Errorf("%q: %v", change, err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("%q was not heard of", change)
		}
	}
}
