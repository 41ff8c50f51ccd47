package e2e

import (
	"errors"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

const accounting = "net.netfilter.nf_conntrack_acct"

// wantAccounting checks the value of the setting.
func (s *scene) wantAccounting(when, want string) {
	s.T.Helper()
	got, err := s.Gateway.Sysctl(accounting)
	s.Must(err)
	if got != want {
		s.T.Errorf("%s: %s is %s, want %s", when, accounting, got, want)
	}
}

// noteOfAccounting returns the path of the note that keeps the setting's earlier value.
func (s *scene) noteOfAccounting() string {
	s.T.Helper()
	var note string
	s.Must(s.Gateway.Do(func() (err error) {
		note, err = control.File(".nf_conntrack_acct")
		return err
	}))
	return note
}

// wantNoNote checks that this note does not exist.
func (s *scene) wantNoNote() {
	s.T.Helper()
	note := s.noteOfAccounting()
	if _, err := os.Stat(note); !errors.Is(err, fs.ErrNotExist) {
		s.T.Errorf("the note %s is there: %v", note, err)
	}
}

// Each backend turns packet counting on while it runs. After the stop the setting has its
// earlier value.
//
// Fails when New does not raise the setting, and when Close does not restore it.
func TestAccountingIsOnWhileTheDaemonRuns(t *testing.T) {
	for _, backend := range []string{"auto", "nft", "expect"} {
		for _, before := range []string{"0", "1"} {
			t.Run(backend+", before "+before, func(t *testing.T) {
				s := newScene(t, lab.Options{})
				s.Must(s.Gateway.SetSysctl(accounting, before))
				s.Start("--subnet", lab.InsideNet.String(), "--backend="+backend)
				s.wantAccounting("while it runs", "1")
				if !s.Status().Accounting {
					t.Error("status says that it is off")
				}
				s.Stop()
				s.wantAccounting("after the stop", before)
				s.wantNoNote()
			})
		}
	}
}

// Fails when Cleanup does not restore the setting, and when the next start forgets its value.
func TestAccountingIsRestoredAfterKill(t *testing.T) {
	for name, end := range map[string]func(s *scene){
		"by cleanup": func(s *scene) {
			if out, code := s.CLI("cleanup"); code != 0 {
				s.T.Errorf("cleanup: exit %d, %q", code, out)
			}
		},
		"by the next daemon": func(s *scene) {
			s.Start("--subnet", lab.InsideNet.String())
			s.wantAccounting("while the next one runs", "1")
			s.Stop()
		},
	} {
		for _, before := range []string{"0", "1"} {
			t.Run(name+", before "+before, func(t *testing.T) {
				s := newScene(t, lab.Options{})
				s.Must(s.Gateway.SetSysctl(accounting, before))
				s.Start("--subnet", lab.InsideNet.String())
				s.Kill()
				s.wantAccounting("after the kill", "1")
				end(s)
				s.wantAccounting("at last", before)
				s.wantNoNote()
			})
		}
	}
}

var saysAccountingIsOff = regexp.MustCompile(`(?m)^accounting +off \(nf_conntrack_acct\)`)

// Fails when the reconcile raises the setting, when status does not report it as off, and when
// a stop writes the setting without reading it first.
func TestAccountingThatTheUserTurnsOffStaysOff(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, before := range []string{"0", "1"} {
		t.Run("before "+before, func(t *testing.T) {
			s := newScene(t, lab.Options{})
			s.Must(s.Gateway.SetSysctl(accounting, before))
			s.Start("--subnet", lab.InsideNet.String(), "--reconcile=1s")
			s.Must(s.Gateway.SetSysctl(accounting, "0"))
			// Without events only a reconcile finds flows. When it finds the second flow, the
			// reconcile that found the first one has ended.
			s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
			for port := range uint16(2) {
				phone, proxy := s.InsideSocket(0, 5060+port), s.PeerSocket(lab.PeerA, 5060+port)
				s.Stands(phone, proxy, s.Contact(phone, proxy))
			}
			s.wantAccounting("after a reconcile", "0")
			if out, code := s.CLI("status"); code != 0 || !saysAccountingIsOff.MatchString(out) {
				t.Errorf("exit %d, status does not say that it is off:\n%s", code, out)
			}
			const warning = "the kernel does not count packets"
			s.told(warning)
			s.Must(s.Gateway.SetSysctl(accounting, "1"))
			s.over(warning)
			s.Must(s.Gateway.SetSysctl(accounting, "0"))
			s.Stop()
			s.wantAccounting("after the stop", "0")
			s.wantNoNote()
		})
	}
}

// With on_stop = "keep" a stop keeps the permissions, and so the setting. If no permission
// stands, the stop restores the setting.
//
// Fails when Close always restores the setting.
func TestAccountingIsKeptWithThePermissions(t *testing.T) {
	s := play(t, lab.Options{}, "--on-stop", "keep")
	s.Stop()
	s.wantAccounting("after a stop that keeps nothing", "0")
	s.Start("--subnet", lab.InsideNet.String(), "--on-stop", "keep")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Stands(phone, proxy, s.Contact(phone, proxy))
	s.Stop()
	s.wantAccounting("after a stop that keeps", "1")
	if out, code := s.CLI("cleanup"); code != 0 {
		t.Errorf("cleanup: exit %d, %q", code, out)
	}
	s.wantAccounting("after cleanup", "0")
	s.wantNoNote()
}

// A flow that is older than the daemon has no counters, so it holds its permission for as long
// as it lives, even if only the peer sends. A newer flow does not.
//
// Fails when the daemon does not turn on the counters.
func TestPeerAloneHoldsOnlyAFlowOlderThanTheCounters(t *testing.T) {
	t.Parallel() // mostly it waits
	s := newScene(t, lab.Options{Inside: 2})
	older, newer := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
	proxy := s.PeerSocket(lab.PeerA, 5060)
	extOlder := s.Contact(older, proxy)
	s.Start("--subnet", lab.InsideNet.String(), "--lifetime", "6s", "--reconcile", "1s")
	extNewer := s.Contact(newer, proxy)
	s.Stands(newer, proxy, extNewer)
	feed := func() {
		s.Must(proxy.Send(extOlder, "x"))
		s.Must(proxy.Send(extNewer, "x"))
	}
	s.Until("that of the newer flow ended", func() bool {
		feed()
		return slices.ContainsFunc(s.List(), func(p control.Permission) bool {
			return p.Int == newer.Addr() && p.State == "refused"
		})
	})
	for end := time.Now().Add(13 * time.Second); time.Now().Before(end); {
		feed()
		s.Stands(older, proxy, extOlder)
	}
	if !hasPort(s.ConntrackList("-p", "udp"), newer) {
		t.Errorf("the newer flow is gone, so this shows nothing\n%s", s.Dump())
	}
}

// A start cannot tell who sent last in a flow, so it renews the permission of one in which the peer
// alone goes on sending. Then the counters tell, and the permission ends, though the peer never rests.
//
// Fails when later looks at such a flow extend the permission as well.
func TestPeerThatSendsAcrossAStartHoldsNothing(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		flags := stage.Flags(mode, "--lifetime=10s", "--reconcile=1s")
		s.Start(flags...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, proxy, ext) // both have sent
		s.Kill()
		s.Must(proxy.Send(ext, "x"))
		s.Start(flags...)
		s.Stands(phone, proxy, ext)
		s.Until("the permission ended", func() bool {
			s.Must(proxy.Send(ext, "x"))
			return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.State == "refused" })
		})
		if !hasPort(s.ConntrackList("-p", "udp"), phone) {
			t.Errorf("the flow is gone, so this shows nothing\n%s", s.Dump())
		}
		if left := s.InKernel(); len(left) > 0 {
			t.Errorf("the kernel has %q", left)
		}
	})
}
