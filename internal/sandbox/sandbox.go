// Package sandbox takes from this process what the daemon does not need.
package sandbox

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Enter leaves the process, with all its threads, no capability but CAP_NET_ADMIN if
// it has that, and what it executes cannot get another one (capabilities(7),
// PR_SET_NO_NEW_PRIVS). It cannot be undone.
//
// Root without capabilities still owns root's files, but may not touch those of others;
// the unit in deploy runs the daemon as a user of its own.
func Enter() error {
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("sandbox: no new privileges: %w", err)
	}
	now := cap.GetProc()
	has := func(c cap.Value) bool {
		on, err := now.GetFlag(cap.Permitted, c)
		return err == nil && on
	}
	if has(cap.SETPCAP) { // else the bounding set stays; no new privileges says the same
		if err := cap.DropBound(others()...); err != nil {
			return fmt.Errorf("sandbox: drop bounding set: %w", err)
		}
	}
	if err := cap.ResetAmbient(); err != nil {
		return fmt.Errorf("sandbox: reset ambient capabilities: %w", err)
	}
	least := cap.NewSet()
	if has(cap.NET_ADMIN) {
		err := errors.Join(least.SetFlag(cap.Permitted, true, cap.NET_ADMIN), least.SetFlag(cap.Effective, true, cap.NET_ADMIN))
		if err != nil {
			return fmt.Errorf("sandbox: %w", err)
		}
	}
	if err := least.SetProc(); err != nil {
		return fmt.Errorf("sandbox: drop capabilities: %w", err)
	}
	return nil
}

// others are the capabilities of this kernel but for CAP_NET_ADMIN.
func others() (all []cap.Value) {
	for c := range cap.MaxBits() {
		if c != cap.NET_ADMIN {
			all = append(all, c)
		}
	}
	return all
}
