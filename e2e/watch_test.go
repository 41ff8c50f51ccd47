package e2e

import (
	"bufio"
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A watching is a running "conenatd watch --json".
type watching struct {
	*scene
	cmd   *lab.Cmd
	lines chan control.Event
}

// watch starts one, and returns when it is told everything.
func (s *scene) watch(args ...string) *watching {
	s.T.Helper()
	w := &watching{s, s.Gateway.Command(s.T.Context(), s.Exe, append([]string{"watch", "--json"}, args...)...), make(chan control.Event, 1024)}
	out, err := w.cmd.StdoutPipe()
	s.Must(err)
	s.Must(w.cmd.Start())
	go func() {
		defer close(w.lines)
		for in := bufio.NewScanner(out); in.Scan(); {
			var e control.Event
			if json.Unmarshal(in.Bytes(), &e) == nil {
				w.lines <- e
			}
		}
	}()
	w.wants("begin", nil)
	return w
}

// wants returns the next event that is about the inside endpoint, which must be of this kind.
func (w *watching) wants(kind string, in *lab.Socket) control.Event {
	w.T.Helper()
	for {
		select {
		case e, ok := <-w.lines:
			if !ok {
				w.T.Fatalf("the watch ended, want %s", kind)
			}
			if in != nil && e.Int != in.Addr() {
				continue
			}
			if e.Event != kind {
				w.T.Fatalf("%+v, want %s", e, kind)
			}
			return e
		case <-time.After(stage.Patience()):
			w.T.Fatalf("no event, want %s", kind)
		}
	}
}

// end waits until the program ends, and checks that it ends well.
func (w *watching) end() {
	w.T.Helper()
	for range w.lines { // what is left
	}
	if err := w.cmd.Wait(); err != nil {
		w.T.Error(err)
	}
}

// Real packets make events, in their order, with carrier, reason and the child's endpoint.
//
// Fails when one is missing, comes twice or has other words, and when the end of the daemon or
// Ctrl-C is an error.
func TestWatchShowsWhatHappens(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Inside: 2})
	s.Serve("--reconcile=1s")
	w, other := s.watch(), s.watch("--host", "10.47.11.110")
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	if e := w.wants("granted", phone); e.Ext != ext || e.Peer != lab.PeerA || e.Backend == "" || e.Time.IsZero() {
		t.Errorf("%+v", e)
	}
	media := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, media, ext)
	if e := w.wants("child", phone); e.From != media.Addr() || e.Ext != ext {
		t.Errorf("%+v", e)
	}
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "-s", lab.PeerA.String(), "--orig-port-src", "5070")
	s.Must(err)
	if e := w.wants("child_gone", phone); e.From != media.Addr() {
		t.Errorf("%+v", e)
	}
	if out, code := s.CLI("revoke", phone.Addr().String()); code != 0 {
		t.Fatal(out)
	}
	if e := w.wants("revoked", phone); e.Reason != "revoked" {
		t.Errorf("%+v", e)
	}
	second := s.InsideSocket(1, 5061)
	s.Contact(second, proxy)
	w.wants("granted", second)
	if e := other.wants("granted", nil); e.Int != second.Addr() {
		t.Errorf("another host's: %+v", e)
	}
	s.Must(other.cmd.Process.Signal(syscall.SIGINT))
	other.end()
	s.Stop()
	w.end()
}

// A client that reads nothing neither slows the loop nor loses anything untold.
//
// Fails when the daemon waits for the client, and when lost events are not counted.
func TestWatcherThatDoesNotReadHoldsNothingUp(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	// There is no room for so many expectations.
	s.Serve(append(slices.Clone(stage.NFT), "--max-permissions-per-host=60000", "--learn-rate=100000")...)
	cmd := s.Gateway.Command(t.Context(), s.Exe, "watch", "--json")
	out, err := cmd.StdoutPipe()
	s.Must(err)
	s.Must(cmd.Start())
	in := bufio.NewScanner(out)
	if !in.Scan() || !strings.Contains(in.Text(), `"begin"`) {
		t.Fatalf("%q", in.Text())
	}
	const ports = 40
	f := s.Scan(10_000, ports) // each to every peer
	s.Must(f.Send(0, f.Len()))
	s.UntilIn(3*stage.Patience(), "the daemon has granted all", func() bool { return s.Status().Permissions.Standing >= f.Len() })
	granted := s.Status().Counters.Granted
	told, lost := uint64(0), uint64(0)
	for told < granted && in.Scan() {
		var e control.Event
		s.Must(json.Unmarshal(in.Bytes(), &e))
		switch e.Event {
		case "granted":
			told++
		case "lost":
			told, lost = told+e.Lost, lost+e.Lost
		}
	}
	if told != granted || lost == 0 {
		t.Errorf("%d events are told or counted, of %d; %d were lost", told, granted, lost)
	}
	s.Must(cmd.Process.Signal(syscall.SIGINT))
	if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() != 0 {
		t.Error(err)
	}
}
