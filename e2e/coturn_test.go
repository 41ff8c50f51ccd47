package e2e

import (
	"context"
	"fmt"
	"net/netip"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/internal/lab"
)

// coturn starts Debian's coturn outside as a STUN server on the ports 3478 and 3479 of the
// addresses, and waits until it is there.
func (s *scene) coturn(addrs []netip.Addr, more ...string) {
	s.T.Helper()
	dir := s.T.TempDir()
	args := []string{
		"-n", "--stun-only", "--listening-port=3478", "--alt-listening-port=3479", "--no-cli", "--no-tls", "--no-dtls", "--no-tcp",
		"--relay-threads=1", "--log-file=stdout", "--pidfile=" + filepath.Join(dir, "pid"), "--userdb=" + filepath.Join(dir, "db"),
	}
	var endpoints []string
	for _, a := range addrs {
		args = append(args, "--listening-ip="+a.String())
		endpoints = append(endpoints, netip.AddrPortFrom(a, 3478).String())
	}
	path, args := debian.Program(coturn(s.T), "usr/bin/turnserver", append(args, more...)...)
	ctx, stop := context.WithCancel(context.WithoutCancel(s.T.Context()))
	server := s.Outside.Command(ctx, path, args...)
	var out strings.Builder
	server.Stdout, server.Stderr = &out, &out
	s.Must(server.Start())
	s.T.Cleanup(func() {
		stop()
		_ = server.Wait() // it was killed
		if s.T.Failed() {
			s.T.Logf("coturn:\n%.4000s", out.String())
		}
	})
	s.Until("coturn listens", func() bool {
		sockets, err := s.Outside.Output("ss", "-Hlun")
		s.Must(err)
		for _, e := range endpoints {
			if !strings.Contains(sockets, " "+e+" ") {
				return false
			}
		}
		return true
	})
}

// coturn returns the folder with Debian's coturn and its libraries, unpacked and not installed:
// the package would start a server.
func coturn(t *testing.T) string {
	t.Helper()
	return debian.ForTest(t, "coturn", debian.UnpackAll, "coturn")
}

// drops makes a chain of a host that drops what a rule matches.
func (s *scene) drops(h *lab.Host, hook, match string) {
	s.T.Helper()
	cmd := h.Command(s.T.Context(), "nft", "-f", "-")
	cmd.Stdin = strings.NewReader(fmt.Sprintf("table inet drops {\n\tchain c {\n\t\ttype filter hook %s priority 0;\n\t\t%s drop\n\t}\n}\n", hook, match))
	if out, err := cmd.CombinedOutput(); err != nil {
		s.T.Fatalf("drop %s: %v: %s", match, err, out)
	}
}
