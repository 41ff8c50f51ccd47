package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// metrics scrapes the daemon at an address of the gateway.
func (s *scene) metrics(addr string) string {
	s.T.Helper()
	return s.scrape(addr, "http://"+addr+"/metrics", http.StatusOK)
}

// scrape connects to addr in the gateway's namespace, a path if it is absolute, and asks for
// url.
func (s *scene) scrape(addr, url string, want int) string {
	s.T.Helper()
	network := "tcp"
	if filepath.IsAbs(addr) {
		network = "unix"
	}
	dial := func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		err = s.Gateway.Do(func() (err error) {
			c, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return err
		})
		return c, err
	}
	client := http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}, Timeout: stage.Patience()}
	r, err := http.NewRequestWithContext(s.T.Context(), http.MethodGet, url, http.NoBody)
	s.Must(err)
	answer, err := client.Do(r)
	s.Must(err)
	defer answer.Body.Close()
	text, err := io.ReadAll(answer.Body)
	s.Must(err)
	if answer.StatusCode != want {
		s.T.Fatalf("%s: status %d, want %d: %s", url, answer.StatusCode, want, text)
	}
	return string(text)
}

// value returns the value of a series in a scrape, 0 if it is missing.
func value(scrape, series string) float64 {
	for line := range strings.Lines(scrape) {
		if text, ok := strings.CutPrefix(line, series+" "); ok {
			v, _ := strconv.ParseFloat(strings.TrimSpace(text), 64)
			return v
		}
	}
	return 0
}

// Fails when the metrics stand still while packets pass, when promtool finds fault with them,
// or when the control socket lacks one of them.
func TestMetricsFollowTraffic(t *testing.T) {
	stage.OfTheDaemon(t)
	const addr = "127.0.0.1:9469"
	s := newScene(t, lab.Options{})
	s.Start(stage.Flags(stage.NFT, "--learn=false", "--metrics-listen="+addr)...)
	before := s.metrics(addr)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	after := s.metrics(addr)
	for _, series := range []string{
		"conenatd_permissions_granted_total", `conenatd_permissions{state="standing"}`, "conenatd_flows", "conenatd_events_received_total",
		`conenatd_children_admitted_total{by="nft"}`, `conenatd_children_passed_total{by="nft"}`, "conenatd_grant_latency_seconds_count",
		"conenatd_grant_latency_seconds_sum", `conenatd_grant_latency_seconds_bucket{le="+Inf"}`, "conenatd_conntrack_entries",
	} {
		if was, is := value(before, series), value(after, series); is <= was {
			t.Errorf("%s: %v before the traffic, %v after it", series, was, is)
		}
	}
	names := func(scrape string) (all []string) {
		for line := range strings.Lines(scrape) {
			if strings.HasPrefix(line, "# TYPE ") {
				all = append(all, line)
			}
		}
		return all
	}
	if control := s.scrape(s.Daemon.Socket, "http://conenatd/metrics", http.StatusOK); fmt.Sprint(names(control)) != fmt.Sprint(names(after)) {
		t.Errorf("control socket:\n%s\nmetrics_listen:\n%s", control, after)
	}
	s.scrape(addr, "http://gateway.example:9469/metrics", http.StatusForbidden)
	promtool := promtool(t)
	cmd := exec.CommandContext(t.Context(), promtool, "check", "metrics")
	cmd.Stdin = strings.NewReader(after)
	if out, err := cmd.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v\n%s", err, out)
	}
}

// Fails when the daemon runs without its metrics, leaves anything in the kernel, or does not
// say what is wrong.
func TestMetricsAddressInUseIsRefused(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	var other net.Listener
	s.Must(s.Gateway.Do(func() (err error) {
		other, err = (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:9469")
		return err
	}))
	defer other.Close()
	for addr, want := range map[string]string{
		"127.0.0.1:9469": "metrics_listen: listen tcp4 127.0.0.1:9469: bind: address already in use; ",
		"0.0.0.0:9469":   "metrics_listen: listen tcp4 0.0.0.0:9469: bind: address already in use; ",
	} {
		out, code := s.CLI("run", "--subnet=10.47.11.0/24", "--control-socket="+filepath.Join(t.TempDir(), "c"), "--metrics-listen="+addr)
		if code != 1 || !strings.Contains(out, want) || strings.Count(out, "\n") != 1 {
			t.Errorf("exit %d, %q, want %q", code, out, want)
		}
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("%s: left in the kernel: %q", addr, left)
		}
	}
}

// Fails when an address that comes later, such as one of a VPN, stops the start, and when it is
// not served once it is there.
func TestMetricsAtAnAddressThatComesLater(t *testing.T) {
	stage.OfTheDaemon(t)
	for addr, link := range map[string]string{"198.51.100.9": "wan0", "2001:db8:99::9": "lo"} {
		s := newScene(t, lab.Options{})
		at := net.JoinHostPort(addr, "9469")
		s.Start(stage.Flags(stage.NFT, "--metrics-listen="+at)...)
		if n := s.logs("WARN", "no link has the address", at); n != 1 {
			t.Errorf("%s: the log says so %d times", addr, n)
		}
		nodad := ""
		if strings.Contains(addr, ":") {
			nodad = " nodad"
		}
		s.IP(s.Gateway, "addr add "+addr+" dev "+link+nodad)
		s.Until("the address is in use", func() bool { // the kernel adds the route of an IPv6 address later
			out, err := s.Gateway.Output("ip", "route", "get", addr)
			return err == nil && strings.HasPrefix(out, "local ")
		})
		if got := s.metrics(at); !strings.Contains(got, "conenatd_build_info") {
			t.Errorf("%s: got %s", addr, got)
		}
	}
}

// Fails when 0.0.0.0 opens the metrics to IPv6, which the user's firewall may not expect.
func TestMetricsOnAllOfIPv4AreNotOnIPv6(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	s.Start(stage.Flags(stage.NFT, "--metrics-listen=0.0.0.0:9469")...)
	s.metrics("127.0.0.1:9469")
	s.Must(s.Gateway.Do(func() error {
		c, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", "[::1]:9469")
		if err == nil {
			c.Close()
		}
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("dial [::1]:9469: %v, want %v", err, syscall.ECONNREFUSED)
		}
		return nil
	}))
}

// promtool returns the path of Debian's promtool, unpacked and not installed: the package
// would start a server.
func promtool(t *testing.T) string {
	t.Helper()
	if runtime.GOARCH != "amd64" {
		debian.Missing(t, "the package with promtool is of amd64")
	}
	tree, _, err := debian.Tree{
		Name:     "promtool",
		Suites:   []string{"bookworm"},
		Packages: func(context.Context, *debian.Apt) ([]string, error) { return []string{"prometheus"}, nil },
		Unpack: func(ctx context.Context, debs, tree string) error {
			files, err := filepath.Glob(filepath.Join(debs, "prometheus_*.deb"))
			if err != nil || len(files) != 1 {
				return fmt.Errorf("packages %q: %w", files, err)
			}
			out, err := exec.CommandContext(ctx, "dpkg-deb", "-x", files[0], tree).CombinedOutput()
			if err != nil {
				return fmt.Errorf("unpack %s: %w: %s", files[0], err, out)
			}
			return os.Remove(filepath.Join(tree, "usr/bin/prometheus")) // 100 MB
		},
		Key:   "1",
		Fresh: 30 * 24 * time.Hour,
	}.Fetch(t.Context())
	if a := (debian.ArchiveError{}); errors.As(err, &a) {
		debian.Missing(t, err.Error())
	}
	if err != nil && tree == "" {
		t.Fatal(err)
	}
	return filepath.Join(tree, "usr/bin/promtool")
}
