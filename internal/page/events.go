package page

import (
	"bytes"
	"fmt"
	"net/http"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

const (
	// mostStreams is how many clients may watch at once. The daemon has 8 places; this leaves
	// some for "conenatd watch".
	mostStreams = 4
	// mostLines is how many events a client gets in a second: no person reads more.
	mostLines = 50
	// readTime is how long a client may take to read an event.
	readTime = 10 * time.Second
)

// events streams what "conenatd watch" prints.
type events struct {
	src     Source
	streams chan struct{} // one element for each client
}

func newEvents(src Source) *events { return &events{src, make(chan struct{}, mostStreams)} }

// serve sends a line for each event as it comes, until the client goes or the daemon stops.
func (es *events) serve(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength != 0 { // net/http would not notice that such a client has gone
		http.Error(w, "events: expected a request without a body", http.StatusBadRequest)
		return
	}
	select {
	case es.streams <- struct{}{}:
		defer func() { <-es.streams }()
	default:
		http.Error(w, fmt.Sprintf("%d pages show live events already: close or pause one of them", mostStreams), http.StatusServiceUnavailable)
		return
	}
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	conn, began := http.NewResponseController(w), false
	var pace pace
	err := es.src.Watch(r.Context(), func(e control.Event) bool {
		began = true
		var text bytes.Buffer
		if !pace.write(&text, e) {
			return true
		}
		_ = conn.SetWriteDeadline(time.Now().Add(readTime))
		_, err := w.Write(text.Bytes())
		return err == nil && conn.Flush() == nil // an error means that the client is gone
	})
	if err != nil && !began {
		http.Error(w, err.Error(), http.StatusServiceUnavailable)
	}
}

// A pace leaves out what is too much for a person.
type pace struct {
	second time.Time // the second of the last event
	lines  int       // in that second
	left   uint64    // events left out since the last line
}

// write writes the line of an event, after one that says how many were left out. It returns
// false if this event is left out, too.
func (p *pace) write(out *bytes.Buffer, e control.Event) bool {
	if e.Event == control.EventLost {
		p.left += e.Lost
		return false
	}
	if s := e.Time.Truncate(time.Second); !s.Equal(p.second) {
		p.second, p.lines = s, 0
	}
	if p.lines++; p.lines > mostLines {
		p.left++
		return false
	}
	if p.left > 0 {
		fmt.Fprintf(out, "%s left out: there are too many to read\n", control.Several(p.left, "event was", "events were"))
		p.left = 0
	}
	_ = control.WriteEvent(out, e) // a buffer takes everything
	return true
}
