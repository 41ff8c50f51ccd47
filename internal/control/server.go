package control

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"time"

	"golang.org/x/net/netutil"
)

// Limits on what one client, or a thousand, can take from the daemon.
const (
	maxConns   = 64              // more wait in the kernel's backlog
	maxLists   = 4               // concurrent lists and explanations; each walks all permissions
	maxHeader  = 4 << 10         // bytes; net/http adds 4 KiB
	headerTime = 2 * time.Second // to send a request
	answerTime = time.Minute     // to read the answer; a million permissions take seconds
	graceTime  = time.Second     // to finish when Serve ends
)

// A Source is the daemon, as the server sees it. Its methods are called from many
// goroutines concurrently. Serve waits for these calls before it returns.
type Source interface {
	// Status must not block for long.
	Status() Status
	// Metrics answers with the metrics of a Status, in Prometheus's text format. It is nil in a
	// build without them.
	Metrics() http.Handler
	// Permissions yields every permission, in any order, until yield returns
	// false. An error says that the list is not complete.
	//
	// yield blocks while a slow client reads, up to a minute. The daemon's own work must
	// not wait for that, so hold no lock during the call.
	Permissions(yield func(Permission) bool) error

	// Verify compares the daemon with the kernel. It may take minutes.
	Verify() (Verification, error)

	// Explain says what becomes of a packet that comes from peer by an outside link to the
	// outside endpoint ext. The peer's port is 0 for any port that has no flow yet.
	Explain(peer, ext netip.AddrPort) (Explanation, error)

	// Watch yields each event from now on, the first one at once, until ctx ends, the daemon
	// stops or yield returns false. yield blocks while a slow client reads; the daemon's own
	// work must not wait for that. An error says that nothing was yielded.
	Watch(ctx context.Context, yield func(Event) bool) error

	// Reload reads the configuration again. After an error nothing has changed.
	Reload() error
	// Revoke ends the permissions that match all words and returns how many ended. There is
	// at least one word. A word is an address (inside, outside or peer) or an endpoint
	// (inside or outside).
	Revoke(words []Word) (int, error)
	// Flush ends all permissions and returns how many ended.
	Flush() (int, error)
}

// Serve answers requests on ln, as ServeHTTP does.
func Serve(ctx context.Context, ln net.Listener, src Source, log *slog.Logger) error {
	return ServeHTTP(ctx, ln, handler{src, src.Metrics(), make(chan struct{}, maxLists)}, log)
}

// ServeHTTP lets h answer requests on ln until ctx ends. Requests that are under way then
// have a second to finish. When ServeHTTP returns, ln is closed, the file of a unix socket is
// removed, and no goroutine is left. The error is nil if ctx ended it. If no descriptors are
// left, ServeHTTP answers one request at a time. Errors of single connections go to log.
func ServeHTTP(ctx context.Context, ln net.Listener, h http.Handler, log *slog.Logger) error {
	var conns sync.WaitGroup
	srv := &http.Server{
		Handler:           withoutBody(h),
		BaseContext:       func(net.Listener) context.Context { return ctx },
		MaxHeaderBytes:    maxHeader,
		ReadHeaderTimeout: headerTime,
		WriteTimeout:      answerTime,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelWarn), // by default net/http writes to stderr
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
	// A client sends one request: an idle connection would only occupy a place.
	srv.SetKeepAlivesEnabled(false)

	served := make(chan error, 1)
	go func() { served <- srv.Serve(netutil.LimitListener(newReserve(ln), maxConns)) }()
	var err error
	select {
	case err = <-served:
		err = fmt.Errorf("serve %v: %w", ln.Addr(), err)
	case <-ctx.Done():
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), graceTime)
		defer cancel()
		_ = srv.Shutdown(grace) // requests that take longer are cut off below
		<-served
	}
	_ = srv.Close()
	conns.Wait()
	return err
}

// withoutBody bounds the time for the body of a request that h answered. No request has one.
// Without a deadline, net/http reads an announced body to its end, however long that takes.
func withoutBody(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() { _ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(headerTime)) }()
		h.ServeHTTP(w, r)
	})
}

type handler struct {
	src     Source
	metrics http.Handler
	lists   chan struct{} // one element for each list or explanation under way
}

func (h handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	method, known := methods[r.URL.Path]
	switch {
	case !known || r.URL.Path == pathMetrics && h.metrics == nil:
		fail(w, http.StatusNotFound, "path %q: not known to this version of conenatd", r.URL.Path)
	case r.Method != method:
		w.Header().Set("Allow", method)
		fail(w, http.StatusMethodNotAllowed, "method %q: only %s is answered", r.Method, method)
	case r.URL.Path == pathStatus:
		send(w, http.StatusOK, h.src.Status())
	case r.URL.Path == pathMetrics:
		h.metrics.ServeHTTP(w, r)
	case r.URL.Path == pathPermissions:
		h.list(w, r)
	case r.URL.Path == pathVerify:
		h.verify(w)
	case r.URL.Path == pathExplain:
		h.explain(w, r)
	case r.URL.Path == pathWatch:
		h.watch(w, r)
	case r.URL.Path == pathReload:
		answer(w, struct{}{}, h.src.Reload())
	case r.URL.Path == pathRevoke:
		h.revoke(w, r)
	case r.URL.Path == pathFlush:
		n, err := h.src.Flush()
		answer(w, result{n}, err)
	}
}

// revoke refuses a request without a word, and one that it understands only in part: the
// fewer words there are, the more permissions a revoke ends.
func (h handler) revoke(w http.ResponseWriter, r *http.Request) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	switch {
	case err != nil:
		fail(w, http.StatusBadRequest, "revoke: %w", err)
		return
	case len(query[wordParameter]) == 0 || len(query) > 1:
		fail(w, http.StatusBadRequest, "revoke: expected one parameter %q or more, and no other; %s ends all permissions", wordParameter, pathFlush)
		return
	}
	var words []Word
	for _, text := range query[wordParameter] {
		word, err := ParseWord(text)
		if err != nil {
			fail(w, http.StatusBadRequest, "%w", err)
			return
		}
		words = append(words, word)
	}
	n, err := h.src.Revoke(words)
	answer(w, result{n}, err)
}

func (h handler) explain(w http.ResponseWriter, r *http.Request) {
	query, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil || len(query[peerParameter]) != 1 || len(query[extParameter]) != 1 || len(query) > 2 {
		fail(w, http.StatusBadRequest, "explain: expected one parameter %q and one %q, and no other", peerParameter, extParameter)
		return
	}
	peer, ext, err := ParsePacket(query.Get(peerParameter), query.Get(extParameter))
	if err != nil {
		fail(w, http.StatusBadRequest, "explain: %w", err)
		return
	}
	if !h.beginList(w, r) {
		return
	}
	defer h.endList()
	x, err := h.src.Explain(peer, ext)
	answer(w, x, err)
}

// verify sends the header at once, because comparing a million permissions may take longer
// than a client waits for it. So a failed verification is reported in the body.
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
	_ = json.NewEncoder(w).Encode(answer) // an error means that the client is gone
}

// answer sends the result of a command.
func answer(w http.ResponseWriter, r any, err error) {
	if err != nil {
		fail(w, http.StatusUnprocessableEntity, "%w", err)
		return
	}
	send(w, http.StatusOK, r)
}

// list writes one permission per line, so that neither side needs the whole list as text. A
// truncated list lacks the last HTTP chunk. A list that the Source could not complete ends
// with an error line.
func (h handler) list(w http.ResponseWriter, r *http.Request) {
	if !h.beginList(w, r) {
		return
	}
	defer h.endList()
	w.Header().Set("Content-Type", "application/x-ndjson")
	buf := bufio.NewWriterSize(&patientWriter{w, http.NewResponseController(w), answerTime}, 64<<10)
	out := json.NewEncoder(buf)
	if err := h.src.Permissions(func(p Permission) bool { return out.Encode(p) == nil }); err != nil {
		_ = out.Encode(failure{err.Error()})
	}
	if buf.Flush() != nil {
		panic(http.ErrAbortHandler) // the client is too slow or gone: do not end the list properly
	}
}

// beginList waits until fewer than maxLists lists and explanations are under way. If it
// returns false, it has answered the request; otherwise call endList.
func (h handler) beginList(w http.ResponseWriter, r *http.Request) bool {
	select {
	case h.lists <- struct{}{}:
		return true
	case <-r.Context().Done(): // no answer at all would look like an empty list
		fail(w, http.StatusServiceUnavailable, "stopping")
		return false
	}
}

func (h handler) endList() { <-h.lists }

// A patientWriter limits the total time that a client takes to read. Time that the Source
// takes does not count.
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
	send(w, code, failure{fmt.Errorf(format, args...).Error()})
}

func send(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // an error means that the client is gone
}
