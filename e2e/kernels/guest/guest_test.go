// Package guest has the tests that need features of a stock kernel; package kernels
// runs them there.
package guest

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/nfnl"
)

func TestMain(m *testing.M) { stage.Main(m) }

// From nfnetlink.h and nfnetlink_cthelper.h.
const nfcthSubsystem, nfcthName, headerLen = 9, 1, 4

// helpers lists the names of the registered user-space helpers (nfnetlink_cthelper),
// once for each family. All network namespaces share them.
func helpers(t *testing.T) (names []string) {
	t.Helper()
	const get = 1 // NFNL_MSG_CTHELPER_GET
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: nfcthSubsystem<<8 | get, Flags: netlink.Request | netlink.Dump},
		Data:   make([]byte, headerLen),
	})
	if err != nil {
		if os.Getenv("CONENATD_GUEST") == "" {
			t.Skipf(`this kernel has no nfnetlink_cthelper (%v): run "make kernels"`, err)
		}
		t.Fatal(err)
	}
	for _, m := range answers {
		d, err := netlink.NewAttributeDecoder(m.Data[headerLen:])
		if err != nil {
			t.Fatal(err)
		}
		for d.Next() {
			if d.Type() == nfcthName {
				names = append(names, d.String())
			}
		}
		if err := d.Err(); err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// On a kernel with nfnetlink_cthelper the daemon registers our own helper, and removes
// it at the stop.
func TestOwnHelperIsChosenAndGoesWithTheDaemon(t *testing.T) {
	before := helpers(t)
	l := lab.ForTest(t, lab.Options{IPv6: true})
	d, err := l.StartDaemon(stage.Exe(), "--backend=expect",
		"--subnet", lab.InsideNet.String(), "--subnet", lab.InsideNet6.String(), "--routed")
	if err != nil {
		t.Fatal(err)
	}
	stopped := false
	t.Cleanup(func() {
		if !stopped {
			d.Kill()
		}
	})
	st, err := control.Dial(d.Socket).Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	own := st.Helper.IPv4
	if !strings.HasPrefix(own, nfnl.OwnHelper) || st.Helper.IPv6 != own {
		t.Errorf("the daemon uses the helpers %+v, want %s", st.Helper, nfnl.OwnHelper)
	}
	during := helpers(t)
	if len(during) != len(before)+2 || !slices.Contains(during, own) {
		t.Errorf("helpers of a running daemon: %q, want one for each family beside %q", during, before)
	}

	in, err := l.Inside(0).Socket(l.Inside(0).Addr, 5060)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	peer, err := l.Outside.Socket(lab.PeerA, 5060)
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	if _, err := in.Contact(peer); err != nil {
		t.Fatal(err)
	}
	var expectations []string
	for end := time.Now().Add(20 * time.Second); len(expectations) == 0 && time.Now().Before(end); {
		if expectations, err = l.Conntrack("expect"); err != nil {
			t.Fatal(err)
		}
	}
	if len(expectations) != 1 || !strings.HasSuffix(strings.TrimSpace(expectations[0]), "helper="+own) {
		t.Errorf("expectations %q, want one with helper=%s", expectations, own)
	}

	stopped = true
	if err := d.Stop(); err != nil {
		t.Fatal(err)
	}
	if after := helpers(t); !slices.Equal(after, before) {
		t.Errorf("helpers before the daemon %q, after it %q", before, after)
	}
}

// Somebody unregisters our helper. The kernel then ends all its expectations, and no
// event that the daemon reads reports it. One reconcile repairs everything, and a
// grant does not wait for that.
//
// Fails when the reconcile compares nothing, when a grant without the helper does not
// register it, and when an anchor without a helper is not replaced: for a while the
// kernel also takes the helper from anchors that the daemon has just restored.
func TestOwnHelperIsUnregistered(t *testing.T) {
	for _, tc := range []struct {
		name      string
		mode      []string
		reconcile string
		expected  int
	}{
		{"expect", stage.Expect, "1s", 2},
		{"auto", stage.Auto, "1s", 1}, // the map carries the IPv4 permission
		{"expect, and no reconcile", stage.Expect, "1h", 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			helpers(t) // skips if the kernel has none
			s := stage.New(t, lab.Options{IPv6: true})
			s.Start(stage.Flags(tc.mode, "--subnet", lab.InsideNet6.String(), "--routed", "--reconcile="+tc.reconcile)...)
			registered := helpers(t)
			h := s.Inside(0)
			phone, a, b := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)
			phone6, a6 := s.Socket(h.Namespace, h.Addr6, 5060), s.PeerSocket(lab.Peer6A, 5060)
			ext, ext6 := s.Contact(phone, a), s.Contact(phone6, a6)
			s.Stands(phone, a, ext)
			s.Stands(phone6, a6, ext6)
			before := expected(s)
			if len(before) != tc.expected {
				t.Fatalf("the kernel expects %v", before)
			}

			began := time.Now()
			unregister(t, s.Status().Helper.IPv4)
			if tc.reconcile == "1h" {
				if now := expected(s); len(now) > 0 {
					t.Errorf("without its helper the kernel expects %v", now)
				}
			} else {
				s.Until("the kernel expects what it expected", func() bool { return slices.Equal(expected(s), before) })
				t.Logf("mended after %v", time.Since(began).Round(time.Millisecond))
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				s.Arrives(phone6, s.PeerSocket(lab.Peer6A, 5070), ext6)
				// A permission that is restored too early loses its helper, and is
				// restored again.
				if n := int(s.Status().Counters.Repaired["expectations"]); n < len(before) || n > 2*len(before) {
					t.Errorf("%d repairs counted, want %d, or some of them twice", n, len(before))
				}
				s.Verified()
			}
			s.Contact(phone, b)
			s.Stands(phone, b, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerB, 5070), ext)
			if now := helpers(t); !slices.Equal(now, registered) {
				t.Errorf("helpers %q, want %q", now, registered)
			}
		})
	}
}

// expected lists the permissions that stand as expectations on anchors with a helper.
func expected(s *stage.Scene) (all []string) {
	s.T.Helper()
	found, err := expect.Left(s.Gateway.FD())
	s.Must(err)
	for _, p := range found {
		all = append(all, fmt.Sprint(p.Permission))
	}
	slices.Sort(all)
	return all
}

func unregister(t *testing.T, helper string) {
	t.Helper()
	const del = 2 // NFNL_MSG_CTHELPER_DEL
	attrs := netlink.NewAttributeEncoder()
	attrs.String(nfcthName, helper)
	body, err := attrs.Encode()
	if err != nil {
		t.Fatal(err)
	}
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	_, err = c.Execute(netlink.Message{
		Header: netlink.Header{Type: nfcthSubsystem<<8 | del, Flags: netlink.Request | netlink.Acknowledge},
		Data:   append(make([]byte, headerLen), body...),
	})
	if err != nil {
		t.Fatalf("unregister helper %s: %v", helper, err)
	}
}
