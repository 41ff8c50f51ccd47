package control

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// What one client, or a thousand, can take from the daemon.
const (
	maxConns   = 64              // more wait in the kernel's backlog
	maxLists   = 4               // lists at once: each may cost the Source a copy
	maxHeader  = 4 << 10         // bytes; net/http adds 4 KiB
	headerTime = 2 * time.Second // to send a request
	answerTime = time.Minute     // to read the answer; a million permissions take seconds
	graceTime  = time.Second     // to finish when Serve ends
)

// A Source is what the daemon tells. Its methods are called from many
// goroutines at once, and Serve does not return before they have.
type Source interface {
	// Status must not block for long.
	Status() Status
	// Permissions yields every permission, in any order, until yield returns
	// false. An error says that the list is not complete.
	//
	// yield blocks while a slow client reads, up to a minute. The daemon's
	// own work must not wait for it: hold no lock meanwhile.
	Permissions(yield func(Permission) bool) error

	// Verify compares the daemon with the kernel. It may take minutes.
	Verify() (Verification, error)

	// Reload reads the configuration again. With an error nothing changed.
	Reload() error
	// Revoke ends the permissions that fit all words, of which there is at least
	// one, and returns how many stood. A word is an address (inside, outside or
	// peer) or an endpoint (inside or outside).
	Revoke(words []string) (int, error)
	// Flush ends all permissions and returns how many stood.
	Flush() (int, error)
}

// Serve answers requests on ln until ctx ends. Requests that are under way
// then have a second to finish. When Serve returns, ln is closed, its file
// removed, and no goroutine left. The error is nil if ctx ended it. Where there is no
// descriptor left, requests are answered one at a time. What goes wrong with a
// connection is for log.
func Serve(ctx context.Context, ln net.Listener, src Source, log *slog.Logger) error {
	var conns sync.WaitGroup
	srv := &http.Server{
		Handler:           handler{src, make(chan struct{}, maxLists)},
		BaseContext:       func(net.Listener) context.Context { return ctx },
		MaxHeaderBytes:    maxHeader,
		ReadHeaderTimeout: headerTime,
		WriteTimeout:      answerTime,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn), // else net/http writes to stderr
		// Close does not wait for the connections' goroutines, so count them.
		ConnState: func(_ net.Conn, s http.ConnState) {
			switch s {
			case http.StateNew:
				conns.Add(1)
			case http.StateClosed:
				conns.Done()
			}
		},
	}
	// A client asks once: an idle one would only hold a place.
	srv.SetKeepAlivesEnabled(false)

	served := make(chan error, 1)
	go func() { served <- srv.Serve(netutil.LimitListener(newReserve(ln), maxConns)) }()
	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("serve control socket: %w", err)
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
		defer cancel()
		_ = srv.Shutdown(grace) // late ones are cut off below
		<-served
	}
	_ = srv.Close()
	conns.Wait()
	return err
}

type handler struct {
	src   Source
	lists chan struct{} // a place for each list under way
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	// No request has a body. net/http drains one that is announced, for as
	// long as it takes, unless there is a deadline.
	defer func() { _ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(headerTime)) }()
	method, known := methods[r.URL.Path]
	switch {
	case !known:
		fail(w, http.StatusNotFound, "path %q: not known to this version of conenatd", r.URL.Path)
	case r.Method != method:
		w.Header().Set("Allow", method)
		fail(w, http.StatusMethodNotAllowed, "method %q: only %s is answered", r.Method, method)
	case r.URL.Path == pathStatus:
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(h.src.Status()) // the client is gone
	case r.URL.Path == pathPermissions:
		h.list(w, r)
	case r.URL.Path == pathVerify:
		h.verify(w)
	case r.URL.Path == pathReload:
		answer(w, struct{}{}, h.src.Reload())
	case r.URL.Path == pathRevoke:
		h.revoke(w, r)
	case r.URL.Path == pathFlush:
		n, err := h.src.Flush()
		answer(w, result{n}, err)
	}
}

// revoke refuses a request without a word, and one that it reads in part only: the
// fewer words there are, the more a revoke ends.
func (h handler) revoke(w http.ResponseWriter, r *http.Request) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	words := query[wordParameter]
	switch {
	case err != nil:
		fail(w, http.StatusBadRequest, "revoke: %w", err)
		return
	case len(words) == 0 || len(query) > 1:
		fail(w, http.StatusBadRequest, "revoke: expected one parameter %q or more, and no other; %s ends all permissions", wordParameter, pathFlush)
		return
	}
	n, err := h.src.Revoke(words)
	answer(w, result{n}, err)
}

// verify begins its answer at once: a look at a million permissions may take longer than a
// client waits for that. If it fails, the answer is a failure all the same.
func (h handler) verify(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/json")
	conn := http.NewResponseController(w)
	_ = conn.SetWriteDeadline(time.Time{})
	_ = conn.Flush()
	var answer any
	answer, err := h.src.Verify()
	if err != nil {
		answer = failure{err.Error()}
	}
	_ = conn.SetWriteDeadline(time.Now().Add(answerTime))
	_ = json.NewEncoder(w).Encode(answer) // the client is gone
}

// answer tells how a command went.
func answer(w http.ResponseWriter, r any, err error) {
	if err != nil {
		fail(w, http.StatusUnprocessableEntity, "%w", err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(r) // the client is gone
}

// list writes one permission per line, so that neither side needs the whole
// list as text. A list cut off lacks the last HTTP chunk; one that the Source
// could not complete ends with an error line.
func (h handler) list(w http.ResponseWriter, r *http.Request) {
	select {
	case h.lists <- struct{}{}:
		defer func() { <-h.lists }()
	case <-r.Context().Done(): // silence would be an empty list
		fail(w, http.StatusServiceUnavailable, "stopping")
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	buf := bufio.NewWriterSize(&patientWriter{w, http.NewResponseController(w), answerTime}, 64<<10)
	out := json.NewEncoder(buf)
	if err := h.src.Permissions(func(p Permission) bool { return out.Encode(p) == nil }); err != nil {
		_ = out.Encode(failure{err.Error()})
	}
	if buf.Flush() != nil {
		panic(http.ErrAbortHandler) // too slow, or gone: make no proper end
	}
}

// A patientWriter gives a client so long to read in all. What the Source takes meanwhile
// does not count.
type patientWriter struct {
	http.ResponseWriter
	conn *http.ResponseController
	left time.Duration
}

func (w *patientWriter) Write(b []byte) (int, error) {
	began := time.Now()
	if err := w.conn.SetWriteDeadline(began.Add(w.left)); err != nil {
		return 0, err
	}
	n, err := w.ResponseWriter.Write(b)
	w.left -= time.Since(began)
	return n, err
}

func fail(w http.ResponseWriter, code int, format string, args ...any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(failure{fmt.Errorf(format, args...).Error()})
}
