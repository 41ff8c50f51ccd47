package metrics

import (
	"context"
	"flag"
	"fmt"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/conenatd/conenatd/internal/control"
)

// scrape returns what Handler answers for a status.
func scrape(t *testing.T, st control.Status) string {
	t.Helper()
	w := httptest.NewRecorder()
	Handler(func() control.Status { return st }).ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), http.MethodGet, "/metrics", http.NoBody))
	if w.Code != http.StatusOK {
		t.Fatalf("status %d: %s", w.Code, w.Body)
	}
	return w.Body.String()
}

// notMetrics are the numbers of a Status that are no metrics, and why.
var notMetrics = map[string]string{
	"PID":                   "an identifier",
	"Lifetime":              "configuration",
	"Latency.P50":           "the histogram gives it",
	"Latency.P99":           "the histogram gives it",
	"Latency.Max":           "since the start, it never falls",
	"Counters.SkippedLinks": "names of links are not bounded",
	"Subnets":               "has addresses",
}

var update = flag.Bool("update", false, "write the metrics into the page")

// fill sets every number in v to a different value, and calls set with its path.
func fill(v reflect.Value, path string, next *int, set func(path string, n int)) {
	if _, skip := notMetrics[path]; skip {
		return
	}
	*next++
	switch v.Kind() {
	case reflect.Int:
		v.SetInt(int64(*next))
	case reflect.Uint64:
		v.SetUint(uint64(*next))
	case reflect.Float64:
		v.SetFloat(float64(*next) * 1e6) // microseconds
	case reflect.Map:
		v.Set(reflect.ValueOf(map[string]uint64{"some_reason": uint64(*next)}))
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Unix(int64(*next), 0)))
			break
		}
		for i := range v.NumField() {
			fill(v.Field(i), strings.TrimPrefix(path+"."+v.Type().Field(i).Name, "."), next, set)
		}
		return
	default:
		return
	}
	set(path, *next)
}

// Fails when a number of the status has no metric, or another one's.
func TestEveryNumberOfTheStatusIsAMetric(t *testing.T) {
	var st control.Status
	want := make(map[string]int)
	next := 1000
	fill(reflect.ValueOf(&st).Elem(), "", &next, func(path string, n int) { want[path] = n })
	st.Latency.Buckets = []control.Bucket{{UpTo: 500, Count: 7}}
	st.BrokenFlows = []control.BrokenFlows{{Flows: 40}, {Flows: 2}}
	st.Findings = []control.Finding{{ID: "no_uplink"}, {ID: "no_uplink"}}
	out := scrape(t, st)
	for path, n := range want {
		if !regexp.MustCompile(fmt.Sprintf(`(?m)^conenatd_\S* %d$`, n)).MatchString(out) {
			t.Errorf("%s: no metric has its value", path)
		}
	}
	for _, line := range []string{
		"conenatd_broken_flows 42", `conenatd_findings{id="no_uplink"} 2`, `conenatd_grant_latency_seconds_bucket{le="0.0005"} 7`,
	} {
		if !strings.Contains(out, line+"\n") {
			t.Errorf("no %s in\n%s", line, out)
		}
	}
}

// Fails when a metric, its type, its labels or its help are only in the code or only in
// docs/metrics.md, or when one has no name or no help. With -update it writes them there.
func TestTheDocumentHasTheMetrics(t *testing.T) {
	kinds := map[prometheus.ValueType]string{prometheus.CounterValue: "counter", prometheus.GaugeValue: "gauge", 0: "histogram"}
	want := make(map[string]string)
	var rows strings.Builder
	for _, m := range append(all[:len(all):len(all)], latency) {
		if m.name == "" || m.name == "_total" || m.help == "" {
			t.Errorf("%q has the help %q", m.name, m.help)
		}
		want["conenatd_"+m.name] = fmt.Sprintf("%s | %s | %s", kinds[m.kind], strings.Join(m.labels, ", "), m.help)
		fmt.Fprintf(&rows, "| `conenatd_%s` | %s |\n", m.name, want["conenatd_"+m.name])
	}
	const page = "../../docs/metrics.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if *update {
		text = regexp.MustCompile("(?m)(^\\| `.*\n)+").ReplaceAllLiteral(text, []byte(rows.String()))
		if err := os.WriteFile(page, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got := make(map[string]string)
	for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (.*) \\|$").FindAllStringSubmatch(string(text), -1) {
		got[m[1]] = m[2]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-code +document:\n%s", diff)
	}
}

// Fails when a name reaches the metrics, or the address itself does not.
func TestOnlyTheListenersAddressIsAnswered(t *testing.T) {
	rest := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	site := Site(func() control.Status { return control.Status{} }, rest)
	ask := func(method, path, host, local string) int {
		r := httptest.NewRequestWithContext(t.Context(), method, path, http.NoBody)
		r.Host = host
		at := &net.TCPAddr{IP: net.ParseIP(local), Port: 9469}
		w := httptest.NewRecorder()
		site.ServeHTTP(w, r.WithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, at)))
		return w.Code
	}
	for _, c := range []struct {
		host, local string
		want        int
	}{
		{"127.0.0.1:9469", "127.0.0.1", 200},
		{"localhost:9469", "127.0.0.1", 200},
		{"LOCALHOST", "::1", 200},
		{"[::1]:9469", "::1", 200},
		{"192.0.2.1:9469", "192.0.2.1", 200},
		{"192.0.2.1", "192.0.2.1", 200},
		{"localhost:9469", "192.0.2.1", 403},
		{"192.0.2.2:9469", "192.0.2.1", 403},
		{"gateway.example:9469", "192.0.2.1", 403},
		{"127.0.0.1.example:9469", "127.0.0.1", 403},
		{"", "127.0.0.1", 403},
	} {
		if got := ask(http.MethodGet, "/metrics", c.host, c.local); got != c.want {
			t.Errorf("host %q at %s: status %d, want %d", c.host, c.local, got, c.want)
		}
	}
	if got := ask(http.MethodPost, "/metrics", "127.0.0.1", "127.0.0.1"); got != http.StatusMethodNotAllowed {
		t.Errorf("POST: status %d", got)
	}
	if got := ask(http.MethodGet, "/", "127.0.0.1", "127.0.0.1"); got != http.StatusTeapot {
		t.Errorf("another path: status %d", got)
	}
	if got := ask(http.MethodGet, "/", "gateway.example", "127.0.0.1"); got != http.StatusForbidden {
		t.Errorf("another path of another host: status %d", got)
	}
	site = Site(func() control.Status { return control.Status{} }, nil)
	if got := ask(http.MethodGet, "/", "127.0.0.1", "127.0.0.1"); got != http.StatusNotFound {
		t.Errorf("another path, without anything else: status %d", got)
	}
}

// Fails when Collect panics for values that a counter can have.
func TestTheLargestCounterIsAMetric(t *testing.T) {
	var st control.Status
	st.Counters.Granted = math.MaxUint64
	if out := scrape(t, st); !strings.Contains(out, "conenatd_permissions_granted_total 1.8446744073709552e+19\n") {
		t.Error(out)
	}
}
