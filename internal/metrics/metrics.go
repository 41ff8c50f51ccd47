package metrics

import (
	"net/http"
	"reflect"
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/conenatd/conenatd/internal/control"
)

// Handler answers every request with the metrics of the Status that read returns, in
// Prometheus's text format. Concurrent scrapes wait for each other, because each makes the
// daemon read counters from the kernel; one whose client has gone is given up.
func Handler(read func() control.Status) http.Handler {
	turn := make(chan struct{}, 1)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case turn <- struct{}{}:
		case <-r.Context().Done():
			return
		}
		st := func() control.Status {
			defer func() { <-turn }()
			return read()
		}()
		registry := prometheus.NewPedanticRegistry()
		registry.MustRegister(collector{&st})
		families, err := registry.Gather()
		if err != nil {
			http.Error(w, "metrics: "+err.Error(), http.StatusInternalServerError)
			return
		}
		format := expfmt.NewFormat(expfmt.TypeTextPlain)
		w.Header().Set("Content-Type", string(format))
		out := expfmt.NewEncoder(w, format)
		for _, f := range families {
			if out.Encode(f) != nil {
				return // the client is gone
			}
		}
	})
}

// A collector collects the metrics of one Status.
type collector struct{ status *control.Status }

// Describe sends the description of each metric.
func (collector) Describe(out chan<- *prometheus.Desc) {
	for i := range all {
		out <- all[i].desc()
	}
	out <- latency.desc()
}

// Collect sends the value of each metric.
func (c collector) Collect(out chan<- prometheus.Metric) {
	for i := range all {
		m := &all[i]
		m.read(c.status, func(v float64, labels ...string) {
			out <- prometheus.MustNewConstMetric(m.desc(), m.kind, v, labels...)
		})
	}
	l := c.status.Latency
	buckets := make(map[float64]uint64, len(l.Buckets))
	for _, b := range l.Buckets {
		buckets[b.UpTo/1e6] = b.Count
	}
	out <- prometheus.MustNewConstHistogram(latency.desc(), l.Count, l.Sum/1e6, buckets)
}

// A metric is a row of the table in table.go: its name without the prefix, the names of its
// labels, and how it is read.
type metric struct {
	name   string
	help   string
	kind   prometheus.ValueType
	labels []string
	read   func(s *control.Status, emit emit)
}

// emit passes on one value, with the values of the metric's labels.
type emit func(v float64, labels ...string)

func (m *metric) desc() *prometheus.Desc {
	return prometheus.NewDesc("conenatd_"+m.name, m.help, m.labels, nil)
}

// latency is a histogram, so it is not in the table.
var latency = metric{
	name: "grant_latency_seconds",
	help: "Time from reading a flow's event to the kernel's acknowledgement of the permission.",
}

type number interface{ ~int | ~uint64 | ~float64 }

// gauge returns a metric with one value that may fall.
func gauge[N number](name, help string, get func(s *control.Status) N) metric {
	return metric{name, help, prometheus.GaugeValue, nil, func(s *control.Status, emit emit) { emit(float64(get(s))) }}
}

// counter returns a metric with one value that only grows, until the daemon starts again or
// makes new tables.
func counter(name, help string, get func(s *control.Status) uint64) metric {
	m := gauge(name+"_total", help, get)
	m.kind = prometheus.CounterValue
	return m
}

// counters returns a counter with one label. A value of the label that never occurred has
// no series.
func counters(name, label, help string, get func(s *control.Status) map[string]uint64) metric {
	return metric{name + "_total", help, prometheus.CounterValue, []string{label}, func(s *control.Status, emit emit) {
		for id, n := range get(s) {
			emit(float64(n), id)
		}
	}}
}

// gauges is counters for values that may fall.
func gauges(name, label, help string, get func(s *control.Status) map[string]uint64) metric {
	m := counters(name, label, help, get)
	m.name, m.kind = name, prometheus.GaugeValue
	return m
}

// ofDecisions returns a counter for each member of control.Decisions.
func ofDecisions() (all []metric) {
	for i, f := range reflect.VisibleFields(reflect.TypeFor[control.Decisions]()) {
		all = append(all, counter(f.Tag.Get("metric"), f.Tag.Get("help"), func(s *control.Status) uint64 {
			return reflect.ValueOf(s.Counters.Decisions).Field(i).Uint()
		}))
	}
	return all
}

// byID counts findings by their identifiers.
func byID(findings []control.Finding) map[string]uint64 {
	n := make(map[string]uint64)
	for _, f := range findings {
		n[f.ID]++
	}
	return n
}

// byMember returns the counters of part of a status, by their names in its JSON.
func byMember(part any) map[string]uint64 {
	n := make(map[string]uint64)
	v := reflect.ValueOf(part)
	for i := range v.NumField() {
		if v.Field(i).Kind() == reflect.Uint64 {
			n[v.Type().Field(i).Tag.Get("json")] = v.Field(i).Uint()
		}
	}
	return n
}

// broken returns the number of broken flows.
func broken(all []control.BrokenFlows) (n int) {
	for _, b := range all {
		n += b.Flows
	}
	return n
}

func build(s *control.Status, emit emit) { emit(1, s.Version, runtime.Version()) }
