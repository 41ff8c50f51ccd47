// Package sandbox drops the privileges that the daemon does not need.
package sandbox

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// Enter drops all capabilities of all threads of this process except CAP_NET_ADMIN, if
// it has that. Programs that it executes cannot gain others (capabilities(7),
// PR_SET_NO_NEW_PRIVS). It cannot be undone.
//
// Without capabilities root still owns root's files, but cannot access those of others;
// the unit in deploy runs the daemon as its own user.
func Enter() error {
	if _, err := cap.Prctlw(unix.PR_SET_NO_NEW_PRIVS, 1); err != nil {
		return fmt.Errorf("sandbox: no new privileges: %w", err)
	}
	now := cap.GetProc()
	has := func(c cap.Value) bool {
		on, err := now.GetFlag(cap.Permitted, c)
		return err == nil && on
	}
	if has(cap.SETPCAP) { // without it the bounding set stays; no_new_privs makes up for that
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

// others are all capabilities of this kernel except CAP_NET_ADMIN.
func others() (all []cap.Value) {
	for c := range cap.MaxBits() {
		if c != cap.NET_ADMIN {
			all = append(all, c)
		}
	}
	return all
}
