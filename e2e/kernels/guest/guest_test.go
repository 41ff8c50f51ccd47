// Package guest has the tests that need what only a stock kernel has; package
// kernels runs them there.
package guest

import (
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
)

func TestMain(m *testing.M) { stage.Main(m) }

// helpers lists the names of the registered user-space helpers
// (nfnetlink_cthelper), once for each family. They are the machine's: network
// namespaces share them.
func helpers(t *testing.T) (names []string) {
	t.Helper()
	const subsystem, get, name, headerLen = 9, 1, 1, 4 // nfnetlink.h, nfnetlink_cthelper.h
	c, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	answers, err := c.Execute(netlink.Message{
		Header: netlink.Header{Type: subsystem<<8 | get, Flags: netlink.Request | netlink.Dump},
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
			if d.Type() == name {
				names = append(names, d.String())
			}
		}
		if err := d.Err(); err != nil {
			t.Fatal(err)
		}
	}
	return names
}

// A kernel with nfnetlink_cthelper gets our own helper, and loses it with the
// daemon.
func TestOwnHelperIsChosenAndGoesWithTheDaemon(t *testing.T) {
	before := helpers(t)
	l := lab.ForTest(t, lab.Options{IPv6: true})
	d, err := l.StartDaemon(stage.Exe(), "--subnet", lab.InsideNet.String(), "--subnet", lab.InsideNet6.String(), "--routed")
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
	if !strings.HasPrefix(own, expect.OwnHelper) || st.Helper.IPv6 != own {
		t.Errorf("the daemon uses the helpers %+v, want %s", st.Helper, expect.OwnHelper)
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
