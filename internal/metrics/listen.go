package metrics

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/control"
)

// Listen listens on the address for scrapes, 0.0.0.0 on IPv4 alone. absent says that no link
// has the address yet: scrapes are answered once one has it. The caller must close the
// listener.
func Listen(addr netip.AddrPort) (ln net.Listener, absent bool, err error) {
	ln, err = listen(addr, nil)
	if absent = errors.Is(err, unix.EADDRNOTAVAIL); absent {
		ln, err = listen(addr, freeBind)
	}
	switch {
	case errors.Is(err, unix.EACCES):
		return nil, absent, fmt.Errorf("metrics_listen: %w; conenatd has no CAP_NET_BIND_SERVICE, so give it a port from 1024 on", err)
	case err != nil:
		return nil, absent, fmt.Errorf("metrics_listen: %w; give it an address of this gateway and a port that no other program has", err)
	}
	return ln, absent, nil
}

func listen(addr netip.AddrPort, control func(network, address string, c syscall.RawConn) error) (net.Listener, error) {
	network := "tcp"
	if addr.Addr().Is4() {
		network = "tcp4" // "tcp" takes 0.0.0.0 for all addresses of IPv6, too
	}
	lc := net.ListenConfig{Control: control}
	lc.SetMultipathTCP(false) // older kernels cannot bind that freely
	return lc.Listen(context.Background(), network, addr.String())
}

// freeBind lets a socket be bound to an address that no link has (ip(7), IP_FREEBIND).
func freeBind(network, _ string, c syscall.RawConn) error {
	level, option := unix.SOL_IPV6, unix.IPV6_FREEBIND
	if network == "tcp4" {
		level, option = unix.SOL_IP, unix.IP_FREEBIND
	}
	var err error
	return errors.Join(c.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), level, option, 1) }), err)
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
