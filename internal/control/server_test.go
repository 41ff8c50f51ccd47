package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

func TestTheClientReadsWhatTheSourceTells(t *testing.T) {
	refused := Permission{
		Int: proxy.Int, Ext: proxy.Ext, Peer: proxy.Peer, Zone: 7,
		State: "refused", Reason: "table_full",
	}
	want := []Permission{proxy, refused, standing("[2001:db8:47::5]:1", "[2001:db8:47::5]:1", "2001:db8:5::5")}
	path, _ := start(t, source{full, these(nil, want...)})

	var got []Permission
	err := Dial(path).Permissions(t.Context(), func(p Permission) error {
		got = append(got, p)
		return nil
	})
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netTypes...)); err != nil || diff != "" {
		t.Errorf("Permissions: %v\n%s", err, diff)
	}
	status, err := Dial(path).Status(t.Context())
	if diff := cmp.Diff(full, status, cmpopts.EquateComparable(netTypes...)); err != nil || diff != "" {
		t.Errorf("Status: %v\n%s", err, diff)
	}
}

func TestTheWordsOfTheWire(t *testing.T) {
	refused := Permission{Int: proxy.Int, Ext: proxy.Ext, Peer: proxy.Peer, State: "refused", Reason: "idle"}
	text, err := json.MarshalIndent([]any{full, proxy, refused, failure{"an error"}}, "", "\t")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "wire.json", string(text)+"\n")
}

func TestAnIncompleteListIsAnError(t *testing.T) {
	path, _ := start(t, source{each: these(errors.New("list expectations: interrupted"), proxy)})
	n := 0
	err := Dial(path).Permissions(t.Context(), func(Permission) error { n++; return nil })
	if err == nil || err.Error() != "conenatd answers: list expectations: interrupted" || n != 1 {
		t.Errorf("%d permissions and %v", n, err)
	}
}

// verifier is a Source whose Verify waits for the next error to return.
type verifier struct {
	source
	errs chan error
}

func (v verifier) Verify() (Verification, error) { return Verification{Flows: 7}, <-v.errs }

// A client waits only a limited time for the beginning of an answer.
//
// Fails when verify sends nothing before the comparison has ended.
func TestVerifyBeginsItsAnswerAtOnce(t *testing.T) {
	src := verifier{errs: make(chan error, 1)}
	path, _ := start(t, src)
	c := Dial(path)
	c.http.Transport.(*http.Transport).ResponseHeaderTimeout = patience
	for _, want := range []error{nil, errors.New("list permissions: interrupted")} {
		body, err := c.ask(t.Context(), http.MethodGet, pathVerify)
		src.errs <- want
		if err != nil {
			t.Fatal(err)
		}
		body.Close()

		src.errs <- want
		v, err := c.Verify(t.Context())
		if want == nil && (err != nil || v.Flows != 7) || want != nil && (err == nil || err.Error() != "conenatd answers: "+want.Error()) {
			t.Errorf("verify: %+v, %v, want %v", v, err, want)
		}
	}
}

func TestTheCallersErrorEndsTheList(t *testing.T) {
	path, stop := start(t, source{each: endless})
	want := errors.New("enough")
	if err := Dial(path).Permissions(t.Context(), func(Permission) error { return want }); !errors.Is(err, want) {
		t.Errorf("Permissions: %v", err)
	}
	stop() // the source was told to stop, or it would yield for ever
}

func TestTheClientSaysWhatWouldMendIt(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "c.sock")
	dead := leftBehind(t)
	for _, path := range []string{missing, dead} {
		want := "no conenatd runs in this network namespace (no answer on " + path + `): start it with "conenatd run"`
		_, err := Dial(path).Status(t.Context())
		if !errors.Is(err, ErrNotRunning) || err.Error() != want {
			t.Errorf("\n got %v\nwant %s", err, want)
		}
	}
	if err := Dial("/x").explain(os.ErrDeadlineExceeded); !strings.Contains(err.Error(), "no answer on /x within 1m0s: it is stopped") {
		t.Error(err)
	}
	for errno, want := range map[unix.Errno]string{
		unix.EACCES: ": run as root, or as a member of the group of /x",
		unix.EPERM:  ": run as root",
	} {
		err := Dial("/x").explain(&os.SyscallError{Syscall: "connect", Err: errno})
		if !strings.HasSuffix(err.Error(), want) {
			t.Error(err)
		}
	}
	path, _ := start(t, source{})
	if _, err := Dial(path).ask(t.Context(), http.MethodGet, "/v2/status"); err == nil ||
		err.Error() != `conenatd answers: path "/v2/status": not known to this version of conenatd` {
		t.Error(err)
	}
}

// A revoke that lost some of its words on the way must not end more than was meant.
func TestARevokeThatIsNotWholeEndsNothing(t *testing.T) {
	path, _ := start(t, unrevoked{t: t})
	for name, query := range map[string]string{
		"without a word":      "",
		"another parameter":   "?words=203.0.113.5",
		"one too many":        "?word=203.0.113.5&peer=203.0.113.6",
		"a word that is lost": "?word=203.0.113.5&word=%zz",
		"a word that is none": "?word=203.0.113.5&word=phone",
		"host bits":           "?word=10.47.11.5/24",
		"a port that is none": "?word=10.47.11.5:0",
		"a zone":              "?word=fe80::1%25wan0",
	} {
		conn := connect(t, path)
		if _, err := io.WriteString(conn, "POST /v1/revoke"+query+" HTTP/1.1\r\nHost: c\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		var f failure
		if err := json.NewDecoder(resp.Body).Decode(&f); err != nil || resp.StatusCode != http.StatusBadRequest || f.Error == "" {
			t.Errorf("%s: %s, %+v, %v", name, resp.Status, f, err)
		}
		resp.Body.Close()
	}
	if _, err := Dial(path).Revoke(t.Context(), nil); err == nil {
		t.Error("the client revokes without a word")
	}
}

// unrevoked is a source that fails the test if something is revoked.
type unrevoked struct {
	source
	t *testing.T
}

func (u unrevoked) Revoke(words []Word) (int, error) {
	u.t.Errorf("revoked: %q", words)
	return 0, nil
}

func (u unrevoked) Flush() (int, error) { return u.Revoke(nil) }

// A reader of a list need not handle null.
func TestNothingIsNull(t *testing.T) {
	for _, v := range []any{Status{}, &Status{Verification: &Verification{}}, Verification{}, &Verification{}} {
		text, err := json.Marshal(v)
		if err != nil || strings.Contains(string(text), "null") {
			t.Errorf("%T: %v\n%s", v, err, text)
		}
	}
}

func TestBadRequestsAreAnsweredAndClosed(t *testing.T) {
	path, _ := start(t, source{})
	for name, tt := range map[string]struct {
		request string
		code    int // 0: hung up on, the answer may be lost
	}{
		"a path that is not there": {"GET /v1/../etc/passwd HTTP/1.1\r\nHost: c\r\n\r\n", 404},
		"another method":           {"DELETE /v1/permissions HTTP/1.1\r\nHost: c\r\n\r\n", 405},
		"a body that is announced": {"GET /v1/status HTTP/1.1\r\nHost: c\r\nContent-Length: 9\r\n\r\n", 200},
		"a body without end":       {"GET /v1/status HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n", 200},
		"garbage":                  {"\x00\xff\x16\x03\x01 not HTTP\r\n\r\n", 400},
		"a huge header":            {"GET /v1/status HTTP/1.1\r\nHost: c\r\nX: " + strings.Repeat("x", 1<<20), 0},
		"half a request":           {"GET /v1/status HTTP/1.1\r\nHo", 400},
		"a second request":         {strings.Repeat("GET /v1/status HTTP/1.1\r\nHost: c\r\n\r\n", 2), 200},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			conn := connect(t, path)
			// The server may hang up on a huge header while it is written.
			if _, err := io.WriteString(conn, tt.request); err != nil && !errors.Is(err, unix.EPIPE) {
				t.Fatal(err)
			}
			in := bufio.NewReader(conn)
			resp, err := http.ReadResponse(in, nil)
			if tt.code != 0 {
				if err != nil {
					t.Fatalf("no answer: %v", err)
				}
				defer resp.Body.Close()
				body, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != tt.code {
					t.Errorf("answer %s, %v, want %d", resp.Status, err, tt.code)
				}
				if tt.code == 404 || tt.code == 405 {
					if text := string(body); !strings.HasPrefix(text, `{"error":"`) {
						t.Errorf("an error without JSON: %s", text)
					}
				}
			}
			// The server closed it, not our deadline. If the server left bytes of ours
			// unread, the close is a reset.
			if n, err := io.Copy(io.Discard, in); n != 0 && tt.code != 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
				t.Errorf("after the answer: %d bytes, %v", n, err)
			}
		})
	}
}

// Whatever a client sends, its request ends, and the next client gets an answer.
func FuzzRequest(f *testing.F) {
	for _, request := range []string{
		"GET /v1/status HTTP/1.1\r\nHost: c\r\n\r\n",
		"GET /v1/permissions HTTP/1.0\r\n\r\n",
		"POST /v1/revoke?word=203.0.113.5&word=%5b2001:db8::1%5d:5060 HTTP/1.1\r\nHost: c\r\nContent-Length: 3\r\n\r\nabc",
		"POST /v1/reload HTTP/1.1\r\nHost: c\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
		"\x00\xff\x16\x03\x01 not HTTP\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	path, _ := start(f, source{status: full, each: these(nil, proxy)})
	f.Fuzz(func(t *testing.T, request []byte) {
		conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
			t.Fatal(err)
		}
		// It may hang up early.
		_, _ = conn.Write(request)
		_ = conn.CloseWrite()
		if _, err := io.Copy(io.Discard, conn); errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("no end of the answer: %v", err)
		}
		if got, err := Dial(path).Status(t.Context()); err != nil || got.PID != full.PID {
			t.Errorf("the next client gets %+v, %v", got, err)
		}
	})
}

func TestAThousandClients(t *testing.T) {
	path, _ := start(t, source{full, these(nil, proxy)})
	client := Dial(path)
	var all sync.WaitGroup
	errs := make(chan error, 1000)
	for i := range cap(errs) {
		all.Go(func() {
			if i%2 == 0 {
				_, err := client.Status(t.Context())
				errs <- err
				return
			}
			errs <- client.Permissions(t.Context(), func(Permission) error { return nil })
		})
	}
	all.Wait()
	close(errs)
	for err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestSilentClientsAreHungUpOn(t *testing.T) {
	path, _ := start(t, source{})
	for range maxConns {
		connect(t, path)
	}
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// request asks for the list and reads no more than the first line of the
// answer: from then on the server is sending.
func request(t *testing.T, path string) {
	t.Helper()
	conn := connect(t, path)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: c\r\n\r\n", pathPermissions)
	if line, err := bufio.NewReaderSize(conn, 16).ReadSlice('\n'); !strings.HasPrefix(string(line), "HTTP/1.1 200") {
		t.Fatalf("%q, %v", line, err)
	}
}

func TestSlowReadersHoldUpNeitherStatusNorTheEnd(t *testing.T) {
	var asked atomic.Int32
	path, stop := start(t, source{each: func(yield func(Permission) bool) error {
		asked.Add(1)
		defer asked.Add(-1)
		_ = endless(yield)
		time.Sleep(50 * time.Millisecond) // a source slow to stop: Serve must wait for it
		return nil
	}})
	for range maxLists {
		request(t, path)
	}
	// One more has to wait for its turn.
	ctx, cancel := context.WithCancel(t.Context())
	waited := make(chan error, 1)
	go func() {
		waited <- Dial(path).Permissions(ctx, func(Permission) error { return errors.New("its turn came") })
	}()
	if _, err := Dial(path).Status(t.Context()); err != nil {
		t.Error(err)
	}
	stop()
	if n := asked.Load(); n != 0 {
		t.Errorf("%d lists are still under way after Serve", n)
	}
	cancel()
	if err := <-waited; err == nil {
		t.Error("a list that was never sent is complete")
	}
}

func TestServeReportsAListenerThatFails(t *testing.T) {
	ln, err := Listen(filepath.Join(t.TempDir(), "c.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ln.Close()
	if err := Serve(t.Context(), ln, source{}, slog.New(slog.DiscardHandler)); err == nil || !strings.HasPrefix(err.Error(), "serve "+ln.Addr().String()+": ") {
		t.Errorf("Serve: %v", err)
	}
}

func TestALongListArrivesWhole(t *testing.T) {
	const n = 10_000
	path, _ := start(t, source{each: these(nil, slices.Repeat([]Permission{proxy}, n)...)})
	got := 0
	if err := Dial(path).Permissions(t.Context(), func(Permission) error { got++; return nil }); err != nil || got != n {
		t.Errorf("%d permissions, %v", got, err)
	}
}

func BenchmarkList(b *testing.B) {
	path, _ := start(b, source{each: these(nil, slices.Repeat([]Permission{proxy}, b.N)...)})
	b.ReportAllocs()
	b.ResetTimer()
	if err := Dial(path).Permissions(b.Context(), func(Permission) error { return nil }); err != nil {
		b.Fatal(err)
	}
}

// Fails when the control socket does not answer with the metrics of its Source.
func TestMetricsAreOnTheControlSocket(t *testing.T) {
	path, _ := start(t, source{})
	body, err := Dial(path).ask(t.Context(), http.MethodGet, pathMetrics)
	if err != nil {
		t.Fatal(err)
	}
	defer body.Close()
	if text, err := io.ReadAll(body); err != nil || string(text) != "conenatd_flows 7\n" {
		t.Errorf("%q, %v", text, err)
	}
}
