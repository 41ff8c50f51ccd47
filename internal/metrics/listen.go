package metrics

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// Listen listens on the address for scrapes, 0.0.0.0 on IPv4 alone. The caller must close the
// listener.
func Listen(addr netip.AddrPort) (net.Listener, error) {
	network := "tcp"
	if addr.Addr().Is4() {
		network = "tcp4" // "tcp" takes 0.0.0.0 for all addresses of IPv6, too
	}
	ln, err := net.ListenTCP(network, net.TCPAddrFromAddrPort(addr))
	if err != nil {
		return nil, fmt.Errorf("metrics_listen: %w; give it an address of this gateway and a port that no other program has", err)
	}
	return ln, nil
}

// Site answers GET /metrics on the listener, and passes other GET requests to rest,
// unless it is nil. Requests for hosts other than the address that they came to are refused:
// a page of another site could otherwise make a browser read the answers, by a name that it
// lets point to this address (DNS rebinding).
func Site(read func() control.Status, rest http.Handler) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", Handler(read))
	if rest != nil {
		mux.Handle("GET /", rest)
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !addressed(r) {
			http.Error(w, fmt.Sprintf("host %q: ask for the address that conenatd listens on, not for a name", r.Host), http.StatusForbidden)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// addressed reports whether the Host of a request is the literal address that the request
// came to, or localhost for a loopback address. The port may differ, as behind a forwarded
// port.
func addressed(r *http.Request) bool {
	local, _ := r.Context().Value(http.LocalAddrContextKey).(*net.TCPAddr)
	if local == nil {
		return false
	}
	at := local.AddrPort().Addr().Unmap().WithZone("")
	host := r.Host
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	if strings.EqualFold(host, "localhost") {
		return at.IsLoopback()
	}
	addr, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(host, "["), "]"))
	return err == nil && addr.Unmap().WithZone("") == at
}
