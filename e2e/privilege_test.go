package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/lab"
)

// unitsUser is a program that runs the program under test with the privileges that the unit in
// deploy gives it.
func (s *scene) unitsUser() string {
	s.T.Helper()
	return s.unprivileged(unitSetting(s.T, "SupplementaryGroups")...)
}

// unprivileged is a program that runs the program under test as a user with no privilege but
// CAP_NET_ADMIN, and with these groups.
func (s *scene) unprivileged(groups ...string) string {
	s.T.Helper()
	also := "--clear-groups"
	if len(groups) > 0 {
		also = "--groups " + strings.Join(groups, ",")
	}
	path := filepath.Join(s.T.TempDir(), "conenatd")
	s.Must(os.WriteFile(path, fmt.Appendf(nil, `#!/bin/sh
exec setpriv --reuid 65534 --regid 65534 %s --no-new-privs \
	--inh-caps -all,+net_admin --ambient-caps -all,+net_admin --bounding-set -all,+net_admin \
	%s "$@"
`, also, s.ForAll()), 0o755))
	return path
}

// netAdmin is a program that runs the program under test as root with CAP_NET_ADMIN alone, as in
// a container.
func (s *scene) netAdmin() string {
	s.T.Helper()
	path := filepath.Join(s.T.TempDir(), "conenatd")
	s.Must(os.WriteFile(path, fmt.Appendf(nil, `#!/bin/sh
exec setpriv --inh-caps -all --bounding-set -all,+net_admin %s "$@"
`, s.Exe), 0o755))
	return path
}

// privileges checks that each thread of the daemon has CAP_NET_ADMIN and no other
// capability, cannot gain one, and has the lines more in its status file.
func (s *scene) privileges(more ...string) {
	s.T.Helper()
	const netAdmin = "0000000000001000"
	want := append(more, "CapInh:\t0000000000000000", "CapPrm:\t"+netAdmin, "CapEff:\t"+netAdmin, "CapBnd:\t"+netAdmin,
		"CapAmb:\t0000000000000000", "NoNewPrivs:\t1")
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", s.Daemon.PID()))
	s.Must(err)
	if len(threads) < 2 {
		s.T.Errorf("threads: %q", threads)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the thread ended
		}
		s.Must(err)
		for _, w := range want {
			if !strings.Contains(string(b), w+"\n") && !strings.Contains(string(b), w+"\t") {
				s.T.Errorf("%s has not %q:\n%s", path, w, b)
			}
		}
	}
}

// A daemon that root starts gives up every other privilege. All other tests show that it
// needs none of them.
//
// Fails when run does not enter the sandbox.
func TestRootKeepsCapNetAdminAlone(t *testing.T) {
	s := play(t, lab.Options{})
	s.privileges("Uid:\t0")
}

// A container has CAP_NET_ADMIN at most, which is enough for the daemon. Doctor cannot try
// conntrack helpers there.
//
// Fails when it finds something that it does not find with all privileges, when it misses
// something, and when it does not say what it did not check.
func TestDoctorWithCapNetAdminAlone(t *testing.T) {
	const unchecked = "backend_missing"
	for name, tc := range map[string]struct {
		rules, backend string
		unchecked      bool
		found          string // one of the findings; empty: there are none
	}{
		"RELATED passes":           {lab.Masquerade + lab.DropPolicy, "auto", true, ""},
		"RELATED passes, no map":   {lab.Masquerade + lab.DropPolicy, "expect", true, ""},
		"nothing passes":           {lab.Masquerade + established, "auto", true, "children_dropped"},
		"no expectations wanted":   {lab.Masquerade + lab.DropPolicy, "nft", false, "children_dropped"},
		"everything passes":        {lab.Masquerade, "auto", true, ""},
		"no source NAT either way": {lab.NoRules, "auto", true, "no_source_nat"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &patient{newScene(t, lab.Options{Rules: tc.rules}), fault{top: "backend = \"" + tc.backend + "\"\n"}, filepath.Join(t.TempDir(), "conenatd.toml")}
			p.write()
			// With expectations, their number in the kernel is a note.
			all := slices.DeleteFunc(p.doctor().Findings, func(f doctor.Finding) bool { return f.ID == "expectations_few" })
			p.Exe = p.netAdmin()
			got := p.doctor()
			if diff := cmp.Diff(all, got.Findings); diff != "" {
				t.Errorf("without CAP_SYS_ADMIN it finds something else:\n%s", diff)
			}
			if is := slices.ContainsFunc(got.Findings, func(f doctor.Finding) bool { return f.ID == tc.found }); is != (tc.found != "") || !is && len(got.Findings) > 0 {
				t.Errorf("found %+v, want %q", got.Findings, tc.found)
			}
			if is := slices.ContainsFunc(got.NotChecked, func(n doctor.NotChecked) bool { return n.ID == unchecked }); is != tc.unchecked {
				t.Errorf("not checked: %+v", got.NotChecked)
			}
		})
	}
}

func TestCapNetAdminIsEnough(t *testing.T) {
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.Must(s.NFT("add rule inet filter forward ct status dnat accept")) // for children that the map admits
	s.Exe = s.unitsUser()
	// Root's daemon left a note in a namespace that is gone, and the inode number is used
	// again.
	note := s.noteOfAccounting()
	s.Must(os.MkdirAll(filepath.Dir(note), 0o755))
	s.Must(os.WriteFile(note, []byte("0 1\n"), 0o644))
	s.Start("--subnet", lab.InsideNet.String(), "--event-buffer", "16777216")
	s.privileges("Uid:\t65534")
	if n := s.Status().Events.ReadBuffer; n < 16<<20 {
		t.Errorf("the event buffer is %d bytes, want 16 MiB", n)
	}
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(phone, s.PeerSocket(lab.PeerB, 5070), ext, proxy)
	s.Stop()
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left after stop: %q", left)
	}
}
