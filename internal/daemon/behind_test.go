package daemon_test

import (
	"fmt"
	"testing"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/lab"
)

// behindInside makes flows while the loop of a daemon waits.
func behindInside(dir string) error {
	d, err := newServing(dir, config.Subnet{Prefix: lab.InsideNet, Routed: true})
	if err != nil {
		return err
	}
	stop, ended := runReady(d)
	defer stop()
	ct, err := conntrack.Dial(nil)
	if err != nil {
		return err
	}
	defer ct.Close()
	const flows = 1000
	in := lab.InsideNet.Addr().Next().Next()
	n, err := d.FlowsAfter(func() error {
		for port := range uint16(flows) {
			f := conntrack.NewFlow(unix.IPPROTO_UDP, conntrack.StatusConfirmed, in, lab.PeerA, 10_000+port, 5060, 600, 0)
			if err := ct.Create(f); err != nil {
				return fmt.Errorf("create flow: %w", err)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	if n != flows {
		return fmt.Errorf("the model knows %d of %d flows", n, flows)
	}
	stop()
	return <-ended
}

// Fails when a verification does not wait for the events that the kernel queued before.
func TestTheLoopCatchesUp(t *testing.T) {
	t.Parallel()
	runRole(t, lab.ForTest(t, lab.Options{}), "behind")
}
