package control

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// patience limits the wait for something that must come. Only a failing test waits that
// long.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	if name := os.Getenv(holdLock); name != "" {
		hold(name)
	}
	goleak.VerifyTestMain(m)
}

// now is the time at which the tests look at the daemon.
var now = time.Date(2003, 5, 1, 12, 0, 0, 0, time.UTC)

func standing(in, ext, peer string) Permission {
	return Permission{
		Int: netip.MustParseAddrPort(in), Ext: netip.MustParseAddrPort(ext), Peer: netip.MustParseAddr(peer),
		State: "standing", Backend: "expect", Flows: 1, Children: 2, Answered: 1,
		Since: now.Add(-90 * time.Second), Expires: now.Add(5 * time.Minute),
	}
}

// proxy is the question of 2003.
var proxy = standing("10.47.11.109:5060", "198.51.100.1:5060", "80.80.80.80")

// source is a Source of fixed answers.
type source struct {
	status Status
	each   func(yield func(Permission) bool) error
}

func (s source) Reload() error                    { return errReload }
func (s source) Verify() (Verification, error)    { return *s.status.Verification, nil }
func (s source) Revoke(words []Word) (int, error) { return len(words), nil }
func (s source) Explain(peer, ext netip.AddrPort) (Explanation, error) {
	return Explanation{
		Peer: peer.Addr(), PeerPort: peer.Port(), Ext: ext, Verdict: "arrives", To: proxy.Int,
		Steps: []Step{{"map", "matches", "it stands"}, {"firewall", "passes", "it is accepted"}},
	}, nil
}

func (s source) Watch(_ context.Context, yield func(Event) bool) error {
	for _, e := range []Event{{Event: EventBegin}, {Event: "granted", Int: proxy.Int, Ext: proxy.Ext, Peer: proxy.Peer}, {Event: EventLost, Lost: 7}} {
		if !yield(e) {
			break
		}
	}
	return nil
}

func (s source) Metrics() http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "conenatd_flows 7\n") })
}
func (s source) Flush() (int, error)                           { return 9, nil }
func (s source) Status() Status                                { return s.status }
func (s source) Permissions(yield func(Permission) bool) error { return s.each(yield) }

// these yields permissions and then err.
func these(err error, ps ...Permission) func(func(Permission) bool) error {
	return func(yield func(Permission) bool) error {
		for _, p := range ps {
			if !yield(p) {
				return nil
			}
		}
		return err
	}
}

var errReload = errors.New("c.toml:3: lifetime: expected a duration")

func TestCommands(t *testing.T) {
	path, _ := start(t, source{status: full})
	c := Dial(path)
	if err := c.Reload(t.Context()); err == nil || !strings.HasSuffix(err.Error(), errReload.Error()) {
		t.Errorf("reload: %v, want the daemon's error", err)
	}
	if n, err := c.Revoke(t.Context(), []Word{{Addrs: netip.MustParsePrefix("203.0.113.5/32")}, {Endpoint: netip.MustParseAddrPort("[2001:db8::1]:5060")}}); n != 2 || err != nil {
		t.Errorf("revoke: %d, %v, want 2", n, err)
	}
	if n, err := c.Flush(t.Context()); n != 9 || err != nil {
		t.Errorf("flush: %d, %v, want 9", n, err)
	}
	if v, err := c.Verify(t.Context()); err != nil || !reflect.DeepEqual(&v, full.Verification) {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// endless yields until yield returns false.
func endless(yield func(Permission) bool) error {
	for yield(proxy) {
	}
	return nil
}

// start serves src until the test ends or stop is called. stop checks that
// Serve ended well and left no file.
func start(t testing.TB, src Source) (path string, stop func()) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "c.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() {
		served <- Serve(ctx, ln, src, slog.New(slog.DiscardHandler))
		close(served)
	}()
	stop = func() {
		t.Helper()
		cancel()
		select {
		case err := <-served: // nil the second time
			if err != nil {
				t.Errorf("Serve: %v", err)
			}
		case <-time.After(patience):
			t.Fatal("Serve does not end")
		}
		if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("socket file after Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return path, stop
}

// connect opens a raw connection that is closed when the test ends.
func connect(t *testing.T, path string) net.Conn {
	t.Helper()
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return conn
}
