// Package metrics turns control.Status into Prometheus metrics. It has no counters of its
// own: each scrape asks for one Status, and nothing is computed between scrapes. No label has
// an address or another unbounded value.
package metrics
