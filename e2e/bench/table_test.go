package main

import (
	"encoding/xml"
	"errors"
	"io"
	"strings"
	"testing"
)

// sample is a table with two arms, nine quads and one column.
func sample() *table {
	steady := func(v float64) (all []float64) {
		for range 9 {
			all = append(all, v)
		}
		return all
	}
	t := &table{
		key: "x", title: "A <title>", about: "What it is.", base: stock, columns: []string{"packets"}, used: "packets",
		noise: map[string]interval{"packets": {1, 0.99, 1.01, true}},
		goals: []wanted{
			{"packets", "nft", stock, goal{bound: 0.5}},
			{"packets", "nft", handAlone, goal{bound: 0.9}},
			{"packets", "missing", stock, goal{bound: 0.5}},
		},
	}
	for arm, ratio := range map[string]float64{"nft": 0.6, handAlone: 0.8} {
		t.add(&result{arm: arm, cell: "packets", ratios: steady(ratio), base: steady(3000), costs: steady(3000 / ratio), used: steady(2500)})
	}
	return t
}

// Fails when a ratio is against the wrong arm, or a goal that was not measured has a verdict.
func TestTableHasRatiosAndVerdicts(t *testing.T) {
	var b strings.Builder
	if err := sample().write(&b, ""); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"## x) A <title>",
		"| against stock | packets | CPU of the program in the gateway, us a flow packets |",
		"| stock | 3000 ns |  |",
		"| nft | 0.600 (0.600 to 0.600) | 2.5 |",
		"| hand | 0.800 (0.800 to 0.800) | 2.5 |",
		"| packets, nft, against stock | >= 0.5 | 0.600 (0.600 to 0.600) | reached |",
		"| packets, nft, against hand | >= 0.9 | 0.750 (0.750 to 0.750) | missed |",
	} {
		if !strings.Contains(b.String(), line+"\n") {
			t.Errorf("no line %q in\n%s", line, b.String())
		}
	}
	if strings.Contains(b.String(), "missing") {
		t.Errorf("it has a row for an arm that was not measured:\n%s", b.String())
	}
}

// Fails when a row of a disturbed table looks like any other, or has a verdict.
func TestDisturbedTableSaysSoInEachRow(t *testing.T) {
	var b strings.Builder
	if err := sample().write(&b, " [disturbed]"); err != nil {
		t.Fatal(err)
	}
	rows := 0
	for line := range strings.Lines(b.String()) {
		head := strings.HasPrefix(line, "| against") || strings.HasPrefix(line, "| goal") || strings.HasPrefix(line, "| ---")
		if !strings.HasPrefix(line, "|") || head {
			continue
		}
		rows++
		if !strings.Contains(line, "[disturbed]") || strings.Contains(line, string(reached)) || strings.Contains(line, string(missed)) {
			t.Errorf("%q", line)
		}
	}
	if rows != 5 {
		t.Errorf("%d rows, want 5", rows)
	}
}

// Fails when the chart is not well-formed, or lacks a point of an arm.
func TestChartHasAPointForEachRatio(t *testing.T) {
	var b strings.Builder
	if err := sample().chart(&b, ""); err != nil {
		t.Fatal(err)
	}
	points, d := 0, xml.NewDecoder(strings.NewReader(b.String()))
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatalf("%v in\n%s", err, b.String())
		}
		if s, ok := token.(xml.StartElement); ok && s.Name.Local == "circle" {
			points++
		}
	}
	if points != 2 || !strings.Contains(b.String(), "A &lt;title&gt;") {
		t.Errorf("%d points in\n%s", points, b.String())
	}
}

// Fails when a value is compared with a base, or the exponent of a cost that is proportional to
// the size is not 1, or that of a constant one not 0.
func TestGrowthIsCalculatedFromBothEnds(t *testing.T) {
	total := &table{key: "e", absolute: true}
	perPacket := &table{key: "c", title: "children"}
	for size, values := range map[int][2]float64{100: {2, 0.5}, 10_000: {200, 0.5}} {
		total.add(&result{arm: "nft", cell: startColumn(startAdopted, size), value: &interval{values[0], values[0] * 0.99, values[0] * 1.01, true}})
		perPacket.add(&result{arm: "nft", cell: childColumn(size), value: &interval{values[1], values[1], values[1], true}})
	}
	sizes := []int{100, 10_000}
	got := growth(&options{sizes: sizes, startFlows: sizes}, []*table{total, perPacket})
	if e := got.of("nft", growthStart).interval(); e.Median != 1 || e.Low >= 1 || e.High <= 1 || e.High > 1.01 {
		t.Errorf("exponent of the total: %v", e)
	}
	var b strings.Builder
	if err := got.write(&b, ""); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"| median and interval | " + growthStart + " | " + growthMemory + " | children |",
		"| nft | 1.000 (0.996 to 1.004) |  | 0.000 (0.000 to 0.000) |",
		"| children, nft | <= 0.05 | 0.000 (0.000 to 0.000) | reached |",
		"| " + growthStart + ", nft | <= 1.05 | 1.000 (0.996 to 1.004) | reached |",
	} {
		if !strings.Contains(b.String(), line+"\n") {
			t.Errorf("no line %q in\n%s", line, b.String())
		}
	}
}
