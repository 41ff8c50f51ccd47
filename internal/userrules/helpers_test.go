package userrules_test

import (
	"net/netip"
	"runtime"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newReader returns a reader of the gateway's rules, set up as in the daemon.
func newReader(t testing.TB, l *lab.Lab) *userrules.Reader {
	t.Helper()
	ours, err := rules.Open(rules.Config{NetNS: l.Gateway.FD()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, ours.Close()) })
	r := userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD(), OwnChain: rules.MarkerChain, Changes: ours.OthersChanges})
	t.Cleanup(func() { check(t, r.Close()) })
	return r
}

// withIPTables runs a test with each of the two iptables, in a lab that has only these
// rules.
func withIPTables(t *testing.T, name, rules string, test func(t *testing.T, l *lab.Lab)) {
	t.Helper()
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		t.Run(variant+"/"+name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.IPTables(variant, rules))
			test(t, l)
		})
	}
}

// readOnce reads the rules of a network namespace.
func readOnce(netns int) (*userrules.Ruleset, error) {
	r := userrules.NewReader(userrules.Config{NetNS: netns, OwnChain: rules.MarkerChain})
	rs, err := r.Read()
	if err == nil {
		err = r.Close()
	}
	return rs, err
}

func ruleset(t testing.TB, l *lab.Lab) *userrules.Ruleset {
	t.Helper()
	rs, err := readOnce(l.Gateway.FD())
	if err != nil {
		t.Fatal(err)
	}
	return rs
}

// childrenOf says what the forward hook of a network namespace does with children.
func childrenOf(netns int, outside []userrules.Link, subnets []netip.Prefix) ([]userrules.ChildVerdicts, error) {
	rs, err := readOnce(netns)
	if err != nil {
		return nil, err
	}
	n, err := gateway.ReadNetwork(netns, gateway.Sides{})
	if err != nil {
		return nil, err
	}
	to, err := n.LinksTo(netns, subnets)
	if err != nil {
		return nil, err
	}
	var inside []userrules.Link
	for _, l := range to {
		inside = append(inside, userrules.Link{Index: l.Index, Name: l.Name})
	}
	return rs.Children(outside, inside, subnets)
}

func output(t *testing.T, l *lab.Lab, name string, args ...string) string {
	t.Helper()
	out, err := l.Gateway.Output(name, args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

// asAnotherUser runs fn as a user that has only CAP_NET_ADMIN. The thread cannot become
// root again.
func asAnotherUser(fn func() error) error {
	runtime.LockOSThread()
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return err
	}
	const nobody = 65534
	for _, call := range [][4]uintptr{
		{unix.SYS_SETGROUPS}, {unix.SYS_SETRESGID, nobody, nobody, nobody}, {unix.SYS_SETRESUID, nobody, nobody, nobody},
	} {
		if _, _, errno := unix.Syscall(call[0], call[1], call[2], call[3]); errno != 0 {
			return errno
		}
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	const admin = 1 << unix.CAP_NET_ADMIN
	caps := [2]unix.CapUserData{{Effective: admin, Permitted: admin}}
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return err
	}
	return fn()
}
