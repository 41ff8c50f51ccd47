package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Fails when an event is lost on the way, and when an error of the caller is not returned.
func TestEventsArriveInOrder(t *testing.T) {
	path, _ := start(t, source{full, these(nil)})
	var got []string
	err := Dial(path).Watch(t.Context(), func(e Event) error {
		got = append(got, e.Event)
		return nil
	})
	if text := strings.Join(got, " "); err != nil || text != "begin granted lost" {
		t.Errorf("%v: %s", err, text)
	}
	enough := errors.New("enough")
	if err := Dial(path).Watch(t.Context(), func(Event) error { return enough }); !errors.Is(err, enough) {
		t.Error(err)
	}
}

// quiet is a source whose watchers are told nothing after the first event.
type quiet struct{ source }

func (q quiet) Watch(ctx context.Context, yield func(Event) bool) error {
	yield(Event{Event: EventBegin})
	<-ctx.Done()
	return nil
}

// Fails when a client that ends is served on, or does not end before the next event.
func TestWatchEndsWithItsClient(t *testing.T) {
	path, _ := start(t, quiet{source{full, these(nil)}})
	ctx, stop := context.WithCancel(t.Context())
	err := Dial(path).Watch(ctx, func(Event) error {
		stop()
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// Fails when a client that announces a body, and goes without sending it, is served.
func TestWatchWithABodyIsRefused(t *testing.T) {
	path, _ := start(t, quiet{source{full, these(nil)}})
	for _, header := range []string{"Content-Length: 9", "Transfer-Encoding: chunked"} {
		conn := connect(t, path)
		if _, err := io.WriteString(conn, "GET "+pathWatch+" HTTP/1.1\r\nHost: c\r\n"+header+"\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil {
			t.Fatal(err)
		}
		if resp.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: %s", header, resp.Status)
		}
	}
}

// full8 is a source that has too many watchers.
type full8 struct{ source }

func (full8) Watch(context.Context, func(Event) bool) error { return errors.New("too many") }

// Fails when a refused watch looks like one without events.
func TestRefusedWatchIsAnError(t *testing.T) {
	path, _ := start(t, full8{source{full, these(nil)}})
	if err := Dial(path).Watch(t.Context(), func(Event) error { return nil }); err == nil || !strings.Contains(err.Error(), "too many") {
		t.Error(err)
	}
}

// Fails when a line lacks who, from where, to whom, by what or why.
func TestEventsForPeople(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6e6, time.Local)
	p := Event{Time: at, Int: proxy.Int, Ext: proxy.Ext, Peer: proxy.Peer}
	with := func(change func(*Event)) Event {
		e := p
		change(&e)
		return e
	}
	for want, e := range map[string]Event{
		"03:04:05.006  watching\n":                                                                   {Time: at, Event: EventBegin},
		"03:04:05.006  7 events were lost: this terminal is too slow\n":                              {Time: at, Event: EventLost, Lost: 7},
		"03:04:05.006  1 event was lost: this terminal is too slow\n":                                {Time: at, Event: EventLost, Lost: 1},
		"03:04:05.006  granted     198.51.100.1:5060 <- 80.80.80.80  to 10.47.11.109:5060  by nft\n": with(func(e *Event) { e.Event, e.Backend = "granted", "nft" }),
		"03:04:05.006  revoked     198.51.100.1:5060 <- 80.80.80.80  to 10.47.11.109:5060: revoked by command\n": with(func(e *Event) {
			e.Event, e.Reason = "revoked", "revoked"
		}),
		"03:04:05.006  child gone  198.51.100.1:5060 <- 80.80.80.80:5070  to 10.47.11.109:5060  by expect\n": with(func(e *Event) {
			e.Event, e.Backend, e.From = "child_gone", "expect", netip.MustParseAddrPort("80.80.80.80:5070")
		}),
	} {
		var b strings.Builder
		if err := WriteEvent(&b, e); err != nil || b.String() != want {
			t.Errorf("%v: %q, want %q", err, b.String(), want)
		}
	}
}

// Fails when an event of another host is selected, or one without a host is not.
func TestEventsAreFiltered(t *testing.T) {
	var f Filter
	if err := f.SetHost("10.47.11.110"); err != nil {
		t.Fatal(err)
	}
	if f.SelectsEvent(&Event{Event: "granted", Int: proxy.Int, Ext: proxy.Ext, Peer: proxy.Peer}) || !f.SelectsEvent(&Event{Event: EventLost}) {
		t.Error("selected wrongly")
	}
}
