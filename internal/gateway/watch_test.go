package gateway_test

import (
	"errors"
	"fmt"
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
		{"", "link set fwb0 master idle0", false},
		{"", "link set fwb0 master lan0", true}, // now its hosts come by the bridge fw0
		{"", "link add other0 type veth peer name other1", false},
		{"", "link del other0", false},
		{"", "link set fwb0 nomaster", true},
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
