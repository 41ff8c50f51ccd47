package daemon

import (
	"errors"
	"net/netip"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

func TestReadyAfterAGoodReconcileOnly(t *testing.T) {
	var f firstReconcile
	fails := errors.New("busy")
	last := time.Duration(0)
	for range firstTries - 1 {
		wait, err := f.tried(fails)
		if wait <= last || wait > 10*time.Second || err != nil {
			t.Fatalf("wait %v after %v, %v", wait, last, err)
		}
		last = wait
	}
	if wait, err := f.tried(nil); wait != 0 || err != nil {
		t.Errorf("a good one: wait %v, %v", wait, err)
	}
	if _, err := f.tried(fails); !errors.Is(err, fails) {
		t.Errorf("the last bad one: %v", err)
	}
}

func TestReconcilesInAHurryAreApart(t *testing.T) {
	for cost, want := range map[time.Duration]time.Duration{
		0: time.Second, 10 * time.Millisecond: time.Second, 100 * time.Millisecond: 3 * time.Second,
		time.Second: 10 * time.Second, 3 * time.Second: 12 * time.Second,
	} {
		if got := rest(cost); got != want {
			t.Errorf("%v after one of %v, want %v", got, cost, want)
		}
	}
}

// Fails when a permission is in no part of an owned map, and so never compared.
func TestEachPartOfAnOwnedMapIsCompared(t *testing.T) {
	const n = 1000
	var parts [ownedParts]int
	for port := range uint16(n) {
		var v cone.View
		v.By = cone.ByMap
		v.Ext = cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 1+port))
		for part := range parts {
			f := found{asked: func(k cone.Key) bool { return partOfKey(k) == uint64(part) }}
			if f.missing(&v) != 0 {
				parts[part]++
			}
		}
	}
	sum := 0
	for _, have := range parts {
		if sum += have; have == 0 || have > n/2 {
			t.Errorf("parts of %v permissions, want about the same of each", parts)
		}
	}
	if sum != n {
		t.Errorf("%d of %d permissions are compared", sum, n)
	}
}
