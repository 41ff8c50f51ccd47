package gateway_test

import (
	"errors"
	"os"
	"testing"

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
