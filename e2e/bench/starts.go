package main

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/control"
)

// startRounds is the most starts that are measured: six are enough for an interval.
const startRounds = 6

// The columns of table e, before the number of flows.
const (
	startReady   = "ready, s"
	startAdopted = "all adopted, s"
	startStopped = "stop, s"
	startMemory  = "resident, MiB"
	startSlabs   = "kernel's slabs, MiB"
)

func startColumn(what string, flows int) string { return what + ", " + count(flows) }

// starts is table e: conenatd starts beside flows that exist.
func starts(o *options) ([]*table, error) {
	t := &table{
		key: "e", title: "Start beside existing flows", absolute: true,
		about: "Each flow earns a permission. Ready is when sd_notify says so; adopted is when all permissions stand. " +
			"Memory is measured then; the slabs are what the machine's grew by since before the start, so other work shows there.",
	}
	for _, flows := range o.startFlows {
		for _, what := range []string{startReady, startAdopted, startStopped, startMemory, startSlabs} {
			t.columns = append(t.columns, startColumn(what, flows))
		}
	}
	for _, a := range named("nft", "nft by event", "auto") {
		for _, flows := range o.startFlows {
			if err := o.startsOf(t, a, flows); err != nil {
				return nil, fmt.Errorf("%s, %d flows: %w", a.name, flows, err)
			}
		}
	}
	return []*table{t}, nil
}

func (o *options) startsOf(t *table, a arm, flows int) error {
	gateways, done, err := o.gateways([]arm{{name: a.name}}, func(g *gateway) error {
		if err := g.room(flows); err != nil {
			return err
		}
		// The flows must outlast the measurement.
		if err := g.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "3600"); err != nil {
			return err
		}
		return g.open(flows)
	})
	defer done()
	if err != nil {
		return err
	}
	g := gateways[0]
	g.arm = a
	samples := make(map[string][]float64)
	for range min(o.rounds, startRounds) {
		if err := o.stopped(); err != nil {
			return err
		}
		if err := g.startOnce(flows, func(what string, v float64) { samples[what] = append(samples[what], v) }); err != nil {
			return err
		}
	}
	for what, all := range samples {
		x := &result{arm: a.name, cell: startColumn(what, flows), ratios: all}
		t.add(x)
		fmt.Fprintf(o.log, "  %-32s %-34s %s\n", x.arm, x.cell, x.interval())
	}
	return nil
}

// room checks that the conntrack table has room for flows.
func (g *gateway) room(flows int) error {
	text, err := g.Gateway.Sysctl("net.netfilter.nf_conntrack_max")
	if err != nil {
		return err
	}
	most, err := strconv.Atoi(text)
	if err == nil && flows > most*9/10 {
		err = fmt.Errorf("nf_conntrack_max is %d: raise it for %d flows, or measure fewer (-start-flows)", most, flows)
	}
	return err
}

// startOnce measures one start and one stop.
func (g *gateway) startOnce(flows int, report func(what string, v float64)) error {
	before, err := slabs()
	if err != nil {
		return err
	}
	began := time.Now()
	if g.daemon, err = g.launch(); err != nil {
		return err
	}
	report(startReady, time.Since(began).Seconds())
	var st control.Status
	err = g.until("all are adopted", 5*time.Minute, func(s control.Status) bool {
		st = s
		return s.Permissions.Standing >= flows
	})
	if err != nil {
		return err
	}
	report(startAdopted, time.Since(began).Seconds())
	report(startMemory, float64(st.Process.Resident)/(1<<20))
	after, err := slabs()
	if err != nil {
		return err
	}
	report(startSlabs, float64(after-before)/(1<<20))
	began = time.Now()
	err = g.stop()
	report(startStopped, time.Since(began).Seconds())
	return err
}

// slabs returns the memory in the kernel's slabs in bytes, of the whole machine.
func slabs() (int, error) {
	text, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	value, _ := field(string(text), "Slab")
	kib, err := strconv.Atoi(strings.TrimSuffix(value, " kB"))
	if err != nil {
		return 0, fmt.Errorf("/proc/meminfo: Slab: %w", err)
	}
	return kib << 10, nil
}
