package page

import (
	"context"
	"embed"
	"encoding/json"
	"net"
	"net/http"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

// A Source is the daemon, as the page sees it: a part of control.Source, with the same
// contracts.
type Source interface {
	Status() control.Status
	Permissions(yield func(control.Permission) bool) error
	Watch(ctx context.Context, yield func(control.Event) bool) error
}

//go:embed page.html page.css page.js
var files embed.FS

// policy lets the page load its own script and style and ask its own server, and nothing
// else (Content Security Policy Level 3). The script can make no HTML from text (Trusted
// Types).
const policy = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"

// Handler answers GET for the page and for what its script asks. It shows addresses of hosts
// and peers, so it answers only requests that came to a loopback address, unless everywhere
// is set.
func Handler(src Source, everywhere bool) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /{$}", file("page.html", "text/html; charset=utf-8"))
	mux.Handle("GET /page.css", file("page.css", "text/css; charset=utf-8"))
	mux.Handle("GET /page.js", file("page.js", "text/javascript; charset=utf-8"))
	mux.Handle("GET /state", ownOrigin(newReader(src, time.Second).serve))
	mux.Handle("GET /events", ownOrigin(newEvents(src).serve))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !everywhere && !loopback(r) {
			http.Error(w, `the page shows addresses of hosts, so it is served on loopback addresses only: open it on the gateway, or through "ssh -L", or set page = "everywhere"`, http.StatusForbidden)
			return
		}
		h := w.Header()
		h.Set("Content-Security-Policy", policy)
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

// loopback reports whether the request came to a loopback address.
func loopback(r *http.Request) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	return local != nil && local.IP.IsLoopback()
}

// ownOrigin refuses requests that a page of another origin makes a browser send (Fetch
// Metadata). Programs send no Sec-Fetch-Site.
func ownOrigin(h http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Sec-Fetch-Site") {
		case "", "same-origin", "none":
			h(w, r)
		default:
			http.Error(w, "only conenatd's own page may ask this", http.StatusForbidden)
		}
	})
}

// file answers with an embedded file.
func file(name, contentType string) http.Handler {
	text, err := files.ReadFile(name)
	if err != nil {
		panic(err) // it is part of the program
	}
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", contentType)
		_, _ = w.Write(text) // an error means that the client is gone
	})
}

// writeJSON answers with a value.
func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v) // an error means that the client is gone
}
