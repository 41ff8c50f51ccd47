package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// An audited line is one of the audit log.
type audited struct{ Time, Event, Protocol, Inside, Outside, Peer string }

// readAudit returns the lines of an audit log about an inside endpoint.
func (s *scene) readAudit(path, inside string) (all []audited) {
	s.T.Helper()
	b, err := os.ReadFile(path)
	s.Must(err)
	for line := range strings.Lines(string(b)) {
		if !strings.HasSuffix(line, "\n") {
			break // being written
		}
		var a audited
		s.Must(json.Unmarshal([]byte(line), &a))
		if a.Inside == inside {
			all = append(all, a)
		}
	}
	return all
}

// untilAudited waits until the last line about the inside endpoint has this event.
func (s *scene) untilAudited(path, inside, event string) (last audited) {
	s.T.Helper()
	s.Until("the audit log has "+event, func() bool {
		all := s.readAudit(path, inside)
		if len(all) == 0 {
			return false
		}
		last = all[len(all)-1]
		return last.Event == event
	})
	return last
}

// Fails when a begin or an end is missing, has other endpoints than the packets had, stays in
// a file that logrotate moved, or names a peer that nobody asked for.
func TestAuditLogHasMappingsAndChildren(t *testing.T) {
	s := newScene(t, lab.Options{})
	dir := t.TempDir()
	path, moved, conf := filepath.Join(dir, "audit.log"), filepath.Join(dir, "audit.log.1"), filepath.Join(dir, "c.toml")
	const subnet = "[[subnet]]\nprefix = \"10.47.11.0/24\"\n"
	configure := func(text string) { s.Must(os.WriteFile(conf, []byte(text+subnet), 0o644)) }
	configure("audit_log = \"" + path + "\"\n")
	s.Start("--config", conf)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	in := phone.Addr().String()

	if a := s.untilAudited(path, in, "mapping_begin"); a.Outside != ext.String() || a.Protocol != "udp" || a.Time == "" {
		t.Errorf("got %+v, want outside %v", a, ext)
	}
	child := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, child, ext)
	if a := s.untilAudited(path, in, "child_begin"); a.Outside != ext.String() || a.Peer != "" {
		t.Errorf("got %+v, want outside %v and no peer", a, ext)
	}

	// As logrotate does, and with peers from now on.
	s.Must(os.Rename(path, moved))
	configure("audit_log = \"" + path + "\"\naudit_peers = true\n")
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Fatal(out)
	}
	before := len(s.readAudit(moved, in))
	second := s.PeerSocket(lab.PeerA, 5071)
	s.Arrives(phone, second, ext)
	if a := s.untilAudited(path, in, "child_begin"); a.Peer != second.Addr().String() {
		t.Errorf("got %+v, want peer %v", a, second.Addr())
	}

	// A path that cannot be opened changes nothing.
	configure("audit_log = \"" + dir + "/none/audit.log\"\n")
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code == 0 || !strings.Contains(out, "audit_log: expected a file that can be written") {
		t.Errorf("exit %d: %s", code, out)
	}
	s.Stop()
	if a := s.untilAudited(path, in, "mapping_end"); a.Outside != ext.String() {
		t.Errorf("got %+v, want outside %v", a, ext)
	}
	if after := len(s.readAudit(moved, in)); after != before {
		t.Errorf("%d lines more went into the old file", after-before)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
}

// Fails when a daemon starts without the audit log that it should write, or leaves something
// behind.
func TestAuditLogThatCannotBeWrittenStopsTheStart(t *testing.T) {
	s := newScene(t, lab.Options{})
	before, err := s.Ruleset()
	s.Must(err)
	out, code := s.CLI("run", "--subnet", lab.InsideNet.String(), "--audit-log", t.TempDir()+"/none/audit.log", "--control-socket", t.TempDir()+"/c.sock")
	if code != 1 || strings.Count(out, "\n") != 1 || !strings.Contains(out, "audit_log: expected a file that can be written: open ") {
		t.Errorf("exit %d: %s", code, out)
	}
	if after, err := s.Ruleset(); err != nil || after != before {
		t.Errorf("the rules are %v\n%s", err, after)
	}
}

// While the kernel hides flows, the audit log would miss them.
//
// Fails when the kernel goes on hiding flows, when a mapping that was there before the audit
// log has no begin, and when the end of the audit log does not bring lean back.
func TestLeanEndsWhileThereIsAnAuditLog(t *testing.T) {
	dir := t.TempDir()
	path, conf := filepath.Join(dir, "audit.log"), filepath.Join(dir, "c.toml")
	s := newScene(t, lab.Options{Inside: 2})
	reload := func(text string) {
		s.Must(os.WriteFile(conf, []byte(text+"[[subnet]]\nprefix = \"10.47.11.0/24\"\n"), 0o644))
		if s.Daemon == nil {
			s.Start(append(slices.Clone(stage.NFT), "--events=lean", "--reconcile=1s", "--config", conf)...)
		} else if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
			t.Fatal(out)
		}
	}
	reload("")
	s.untilEvents("lean")
	first, second := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)
	peer := s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(first, peer)
	s.Stands(first, peer, ext)

	reload("audit_log = \"" + path + "\"\n")
	s.untilAudited(path, first.Addr().String(), "mapping_begin")
	s.untilEvents("all")
	s.Contact(second, peer)
	s.untilAudited(path, second.Addr().String(), "mapping_begin")
	reload("")
	s.untilEvents("lean")
}
