package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"time"
)

// Events that are not about a permission.
const (
	EventBegin = "begin" // the first one: what happens from now on is told
	EventLost  = "lost"  // the client was too slow
)

// An Event is something that happened to a permission.
type Event struct {
	Time    time.Time      `json:"time"`
	Event   string         `json:"event"`
	Int     netip.AddrPort `json:"int,omitzero"`
	Ext     netip.AddrPort `json:"ext,omitzero"`
	Peer    netip.Addr     `json:"peer,omitzero"`
	Peers   netip.Prefix   `json:"peers,omitzero"` // if the peer is a group or everybody
	Zone    uint16         `json:"zone,omitempty"`
	Backend string         `json:"backend,omitempty"`
	Reason  string         `json:"reason,omitempty"`
	From    netip.AddrPort `json:"from,omitzero"`  // of a child: its endpoint on the peer's side
	Lost    uint64         `json:"lost,omitempty"` // events that the client missed
}

// permission is the permission that the event is about.
func (e *Event) permission() *Permission {
	return &Permission{Int: e.Int, Ext: e.Ext, Peer: e.Peer, Peers: e.Peers, Zone: e.Zone}
}

// SelectsEvent reports whether the filter selects e. Events without a permission are always
// selected.
func (f Filter) SelectsEvent(e *Event) bool {
	f.State = ""
	return !e.Int.IsValid() || f.Selects(e.permission())
}

// WriteEvent writes a line for people.
func WriteEvent(w io.Writer, e Event) error {
	at := e.Time.Local().Format("15:04:05.000")
	var err error
	switch e.Event {
	case EventBegin:
		_, err = fmt.Fprintf(w, "%s  watching\n", at)
	case EventLost:
		_, err = fmt.Fprintf(w, "%s  %s lost: this terminal is too slow\n", at, Several(e.Lost, "event was", "events were"))
	default:
		text := fmt.Sprintf("%s  %-10s  %v <- %v", at, strings.ReplaceAll(e.Event, "_", " "), e.Ext, e.permission().PeerText())
		if e.From.IsValid() {
			text = fmt.Sprintf("%s  %-10s  %v <- %v", at, strings.ReplaceAll(e.Event, "_", " "), e.Ext, e.From)
		}
		text += fmt.Sprintf("  to %v", e.Int)
		if e.Backend != "" {
			text += "  by " + e.Backend
		}
		if e.Reason != "" {
			text += ": " + Words(e.Reason)
		}
		_, err = fmt.Fprintln(w, text)
	}
	return err
}

// watch sends a line for each event as it comes. net/http does not notice that a client has
// gone before it has read the body: one that never comes would occupy a watcher's place.
func (h handler) watch(w http.ResponseWriter, r *http.Request) {
	if r.ContentLength != 0 {
		fail(w, http.StatusBadRequest, "watch: expected a request without a body")
		return
	}
	conn, out := http.NewResponseController(w), json.NewEncoder(w)
	w.Header().Set("Content-Type", "application/x-ndjson")
	began := false
	err := h.src.Watch(r.Context(), func(e Event) bool {
		began = true
		_ = conn.SetWriteDeadline(time.Now().Add(answerTime))
		return out.Encode(e) == nil && conn.Flush() == nil // an error means that the client is gone
	})
	if err != nil && !began {
		fail(w, http.StatusServiceUnavailable, "%w", err)
	}
}

// Watch calls f for each event as it comes, until f returns an error, which Watch returns
// unchanged, until the daemon stops, or until ctx ends; the error is nil then.
func (c *Client) Watch(ctx context.Context, f func(Event) error) error {
	body, err := c.ask(ctx, http.MethodGet, pathWatch)
	if err != nil {
		return err
	}
	defer body.Close()
	for in := json.NewDecoder(body); ; {
		var e Event
		switch err := in.Decode(&e); {
		case ctx.Err() != nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return fmt.Errorf("read events: %w", err)
		}
		if err := f(e); err != nil {
			return err
		}
	}
}
