package ctwatch

import (
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Fails when the Watcher counts itself, or a socket of another protocol or in other groups.
func TestOtherListenersAreCounted(t *testing.T) {
	enterNetNS(t)
	w := dialWatcher(t, Config{})
	join := func(protocol, group int) {
		t.Helper()
		fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, protocol)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Close(fd) })
		if err := unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_ADD_MEMBERSHIP, group); err != nil {
			t.Fatal(err)
		}
	}
	want := 0
	check := func(more int) {
		t.Helper()
		want += more
		if n, err := w.OtherListeners(); n != want || err != nil {
			t.Errorf("%d other listeners, want %d (%v)", n, want, err)
		}
	}
	check(0)
	join(unix.NETLINK_NETFILTER, unix.NFNLGRP_NFTABLES)
	join(unix.NETLINK_NETFILTER, unix.NFNLGRP_CONNTRACK_EXP_NEW)
	join(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	check(0)
	for _, group := range []int{unix.NFNLGRP_CONNTRACK_NEW, unix.NFNLGRP_CONNTRACK_UPDATE, unix.NFNLGRP_CONNTRACK_DESTROY} {
		join(unix.NETLINK_NETFILTER, group)
		check(1)
	}
	dialWatcher(t, Config{}) // of another conenatd
	check(1)
}

// A list that cannot be read must not look like one without listeners.
func TestUnreadableListOfListenersIsAnError(t *testing.T) {
	const names = "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    Drops    Inode\n"
	for _, line := range []string{"000 12 7", "000 12 x 00000001 0 0 0 2 0 41", "000 12 7 xyz 0 0 0 2 0 41", "000 12 7 00000001 0 0 0 2 0 x"} {
		if all, err := Listeners(strings.NewReader(names + line + "\n")); err == nil {
			t.Errorf("%q: %d listeners", line, len(all))
		}
	}
}
