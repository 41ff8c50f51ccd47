package page

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

// daemon is a Source of fixed answers that notes when it was asked.
type daemon struct {
	permissions []control.Permission
	err         error
	events      []control.Event
	takes       time.Duration // to walk the permissions

	lock  sync.Mutex
	asked []time.Time
}

func (d *daemon) Status() control.Status {
	d.lock.Lock()
	defer d.lock.Unlock()
	d.asked = append(d.asked, time.Now())
	return control.Status{Version: "1.0", Outside: []string{"wan0"}, Subnets: []control.Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24")}}}
}

func (d *daemon) Permissions(yield func(control.Permission) bool) error {
	time.Sleep(d.takes)
	for _, p := range d.permissions {
		if !yield(p) {
			break
		}
	}
	return d.err
}

// Watch tells the events, if there are any, and then waits.
func (d *daemon) Watch(ctx context.Context, yield func(control.Event) bool) error {
	for _, e := range d.events {
		if !yield(e) {
			return nil
		}
	}
	if len(d.events) > 0 {
		<-ctx.Done()
	}
	return nil
}

// permission returns the permission of host i of 10.47.0.0/16 for a peer.
func permission(i int, peer string) control.Permission {
	host := netip.AddrFrom4([4]byte{10, 47, byte(i >> 8), byte(i)})
	return control.Permission{
		Int: netip.AddrPortFrom(host, 5060), Ext: netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), uint16(20000+i)),
		Peer: netip.MustParseAddr(peer), State: "standing", Backend: "nft",
	}
}

// ask sends a request that came to the local address.
func ask(h http.Handler, ctx context.Context, path, local string, header http.Header) *httptest.ResponseRecorder {
	at := &net.TCPAddr{IP: net.ParseIP(local), Port: 9469}
	r := httptest.NewRequestWithContext(context.WithValue(ctx, http.LocalAddrContextKey, at), http.MethodGet, path, http.NoBody)
	r.Header = header
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// stateOf returns the state that a search gets.
func stateOf(t *testing.T, h http.Handler, search string) (st state) {
	t.Helper()
	w := ask(h, t.Context(), "/state?search="+search, "127.0.0.1", nil)
	if err := json.Unmarshal(w.Body.Bytes(), &st); err != nil {
		t.Fatalf("status %d, %s: %v", w.Code, w.Body, err)
	}
	return st
}

// Fails when the daemon is asked more than once a second, or, while a list takes longer, more
// than half of the time; when a client waits for nothing; and when the daemon is asked while
// nobody looks.
func TestDaemonIsAskedOnceForAllClients(t *testing.T) {
	for _, takes := range []time.Duration{0, 3 * time.Second} {
		synctest.Test(t, func(t *testing.T) {
			d := &daemon{permissions: []control.Permission{permission(1, "203.0.113.5"), permission(2, "203.0.113.6")}, takes: takes}
			h := Handler(d, false)
			var clients sync.WaitGroup
			for i := range 20 {
				clients.Go(func() {
					for range 5 {
						if st := stateOf(t, h, fmt.Sprintf("203.0.113.%d", 5+i%2)); st.Found != 1 || st.Rows[0].Peer != d.permissions[i%2].Peer {
							t.Errorf("client %d: %+v", i, st.found)
						}
					}
				})
			}
			clients.Wait()
			least := max(time.Second, 2*takes)
			for i, at := range d.asked[1:] {
				if gap := at.Sub(d.asked[i]); gap < least {
					t.Errorf("asked again after %v, want %v", gap, least)
				}
			}
			if n := len(d.asked); n < 5 || n > 7 {
				t.Errorf("asked %d times for 20 clients with 5 requests each", n)
			}
			n := len(d.asked)
			time.Sleep(time.Hour)
			if len(d.asked) != n {
				t.Error("asked while nobody looks")
			}
		})
	}
}

// Fails when a client that has gone stays in the queue, or keeps its turn.
func TestClientsThatGoLeaveNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &daemon{}
		rd := newReader(d, time.Second)
		h := ownOrigin(rd.serve)
		stateOf(t, h, "")
		ctx, cancel := context.WithCancel(t.Context())
		var clients sync.WaitGroup
		for range 3 {
			clients.Go(func() { ask(h, ctx, "/state", "127.0.0.1", nil) })
		}
		synctest.Wait()
		cancel()
		clients.Wait()
		if len(rd.waiting) != 0 || len(rd.turn) != 0 || len(d.asked) != 1 {
			t.Errorf("%d wait, turn taken: %d, asked %d times", len(rd.waiting), len(rd.turn), len(d.asked))
		}
		stateOf(t, h, "")
	})
}

// Fails when an answer has more rows than it may, others than the first, or a wrong count;
// and when an incomplete list looks complete.
func TestRowsAreTheFirst(t *testing.T) {
	d := &daemon{err: errors.New("the daemon stops")}
	for i := range 1000 {
		d.permissions = append(d.permissions, permission(i*7%1000, "203.0.113.5"))
	}
	st := stateOf(t, Handler(d, false), "")
	if st.All != 1000 || st.Found != 1000 || len(st.Rows) != mostRows || !strings.Contains(st.Error, "the daemon stops") {
		t.Fatalf("%d of %d, %d rows, %q", st.Found, st.All, len(st.Rows), st.Error)
	}
	for i, r := range st.Rows {
		if want := permission(i, "203.0.113.5"); r.Int != want.Int {
			t.Fatalf("row %d: %v, want %v", i, r.Int, want.Int)
		}
	}
}

// Fails when a search finds another permission than the one it describes.
func TestSearch(t *testing.T) {
	group := permission(300, "192.0.2.0")
	group.Peers, group.State, group.Reason = netip.MustParsePrefix("192.0.2.0/24"), "refused", "host_limit"
	anybody := permission(301, "0.0.0.0")
	anybody.Peers = netip.MustParsePrefix("0.0.0.0/0")
	d := &daemon{permissions: []control.Permission{permission(1, "203.0.113.5"), group, anybody}}
	for search, want := range map[string]string{
		"":                       "10.47.0.1 10.47.1.44 10.47.1.45",
		"203.0.113.5":            "10.47.0.1",
		"%20203.0.%20STANDING":   "10.47.0.1",
		"20300":                  "10.47.1.44",
		"limit+per+inside":       "10.47.1.44",
		"anybody":                "10.47.1.45",
		"10.47.1.0/24":           "10.47.1.44 10.47.1.45",
		"10.47.1.0/24+refused":   "10.47.1.44",
		"203.0.113.0/24+10.47.0": "10.47.0.1",
		"192.0.2.128/25":         "10.47.1.44 10.47.1.45",
		"refused+anybody":        "",
		"1/2":                    "",
	} {
		var got []string
		for _, r := range stateOf(t, Handler(d, false), search).Rows {
			got = append(got, r.Int.Addr().String())
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%q finds %q, want %q", search, got, want)
		}
	}
}

// Fails when the page is served where nobody asked for it, or to another origin, or without
// its policy.
func TestWhoMaySeeThePage(t *testing.T) {
	from := func(site string) http.Header { return http.Header{"Sec-Fetch-Site": {site}} }
	for _, c := range []struct {
		path, local string
		everywhere  bool
		header      http.Header
		want        int
	}{
		{"/", "127.0.0.1", false, nil, 200},
		{"/", "::1", false, nil, 200},
		{"/", "192.0.2.1", false, nil, 403},
		{"/state", "192.0.2.1", false, nil, 403},
		{"/events", "192.0.2.1", false, nil, 403},
		{"/", "192.0.2.1", true, nil, 200},
		{"/state", "192.0.2.1", true, nil, 200},
		{"/", "127.0.0.1", false, from("cross-site"), 200}, // a link to the page
		{"/state", "127.0.0.1", false, from("same-origin"), 200},
		{"/state", "127.0.0.1", false, from("none"), 200},
		{"/state", "127.0.0.1", false, from("same-site"), 403}, // another port of localhost
		{"/state", "127.0.0.1", false, from("cross-site"), 403},
		{"/events", "127.0.0.1", false, from("cross-site"), 403},
		{"/page.html", "127.0.0.1", false, nil, 404},
		{"/v1/status", "127.0.0.1", false, nil, 404},
	} {
		w := ask(Handler(&daemon{}, c.everywhere), t.Context(), c.path, c.local, c.header)
		if w.Code != c.want {
			t.Errorf("%+v: status %d", c, w.Code)
		}
		if w.Code == 200 && (!strings.HasPrefix(w.Header().Get("Content-Security-Policy"), "default-src 'none';") || w.Header().Get("Access-Control-Allow-Origin") != "") {
			t.Errorf("%+v: %v", c, w.Header())
		}
	}
}

// Fails when more clients get events than there are places, when a place is lost, and when the
// refusal does not say what to do.
func TestPlacesForEventsAreLimited(t *testing.T) {
	srv := httptest.NewServer(Handler(&daemon{events: []control.Event{{Event: control.EventBegin}}}, false))
	defer srv.Close()
	open := func() (*http.Response, func()) {
		ctx, cancel := context.WithCancel(t.Context())
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/events", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		return answer, func() { cancel(); answer.Body.Close() }
	}
	var closers []func()
	for range mostStreams {
		answer, end := open()
		closers = append(closers, end)
		if answer.StatusCode != http.StatusOK {
			t.Fatal(answer.Status)
		}
	}
	answer, end := open()
	text, _ := io.ReadAll(answer.Body)
	end()
	if answer.StatusCode != http.StatusServiceUnavailable || string(text) != "4 pages show live events already: close or pause one of them\n" {
		t.Errorf("status %d, %q", answer.StatusCode, text)
	}
	for _, end := range closers {
		end()
	}
	for deadline := time.Now().Add(time.Minute); ; { // until the server notices
		answer, end := open()
		end()
		if answer.StatusCode == http.StatusOK {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no place is free again")
		}
	}
}

// Fails when a client gets more than a person reads, or is not told what it did not get.
func TestEventsOfAStormAreLeftOut(t *testing.T) {
	at := time.Date(2003, 5, 1, 12, 0, 0, 0, time.UTC)
	d := &daemon{}
	for range 1000 {
		d.events = append(d.events, control.Event{Time: at, Event: "granted"})
	}
	d.events = append(d.events, control.Event{Time: at, Event: control.EventLost, Lost: 7}, control.Event{Time: at.Add(time.Second), Event: "revoked"})
	synctest.Test(t, func(t *testing.T) { // to know when all events are told
		ctx, cancel := context.WithCancel(t.Context())
		w := httptest.NewRecorder()
		go newEvents(d).serve(w, httptest.NewRequestWithContext(ctx, http.MethodGet, "/events", http.NoBody))
		synctest.Wait()
		cancel()
		synctest.Wait()
		lines := strings.Split(strings.TrimSuffix(w.Body.String(), "\n"), "\n")
		if len(lines) != mostLines+2 || !strings.HasPrefix(lines[mostLines], "957 events were left out") || !strings.Contains(lines[mostLines+1], "revoked") {
			t.Errorf("%d lines, the last ones %q", len(lines), lines[max(0, len(lines)-3):])
		}
	})
}
