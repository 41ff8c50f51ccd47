package rules_test

import (
	"errors"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// Fails when a change of something else, or of other elements, replaces elements that stay:
// meanwhile a packet may find neither the old nor the new one.
func TestSetLeavesElementsThatStay(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	table := open(t, l)
	set(t, table, all)
	events := elementEvents(t, l)
	d := all
	d.MaxChildren++
	set(t, table, d)
	if n := events(); n != 0 {
		t.Errorf("another limit changed %d elements", n)
	}
	check(t, table.Close())
	table = open(t, l)
	set(t, table, all)
	if n := events(); n != 0 {
		t.Errorf("a start with another limit changed %d elements", n)
	}
	check(t, table.Close())
	table = open(t, l)
	d = all
	d.OutsideLinks = []string{"wan0", "ppp0", "ppp1"}
	set(t, table, d)
	if n := events(); n != 2 { // one in each table
		t.Errorf("one more link changed %d elements, want 2", n)
	}
	check(t, table.Close())
	table = open(t, l)
	set(t, table, all)
	if n := events(); n != 2 {
		t.Errorf("one link less changed %d elements, want 2", n)
	}
	checkContents(t, l)
}

// elementEvents returns a function that counts the events about elements of sets since its last
// call. The kernel queues them before it acknowledges the transaction.
func elementEvents(t *testing.T, l *lab.Lab) func() (n int) {
	t.Helper()
	fd := int(listenForEvents(t, l, unix.NFNLGRP_NFTABLES))
	return func() (n int) {
		t.Helper()
		b := make([]byte, 1<<18)
		for {
			size, _, err := unix.Recvfrom(fd, b, 0)
			if errors.Is(err, unix.EAGAIN) {
				return n
			}
			check(t, err)
			messages, err := syscall.ParseNetlinkMessage(b[:size])
			check(t, err)
			for _, m := range messages {
				switch m.Header.Type {
				case unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_NEWSETELEM, unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_DELSETELEM:
					n++
				}
			}
		}
	}
}
