package main

import (
	"encoding/xml"
	"fmt"
	"io"
	"math"
	"strings"
)

// The measures of a chart in pixels.
const (
	chartLabel  = 250 // the names of arms
	chartColumn = 190
	chartGap    = 20
	chartRow    = 20
	chartHead   = 46
	chartFoot   = 30
	chartAcross = 4 // columns in a line; more go below
)

// chart draws a panel for each column of the table: a point for the ratio of each arm, with
// its confidence interval, and a line at 1.
func (t *table) chart(w io.Writer, mark string) error {
	across := min(chartAcross, max(1, len(t.columns)))
	lines := (len(t.columns) + across - 1) / across
	height := chartHead + len(t.rows)*chartRow + chartFoot
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12">`+"\n",
		chartLabel+across*(chartColumn+chartGap), lines*height+chartHead)
	b.WriteString(`<rect width="100%" height="100%" fill="white"/>` + "\n")
	title := fmt.Sprintf("%s: ratio to %s, median and %.0f %% interval%s", t.title, t.base, 100*confidence, mark)
	if t.absolute {
		title = fmt.Sprintf("%s, median and %.0f %% interval%s", t.title, 100*confidence, mark)
	}
	words(&b, 10, 20, "start", 15, title)
	for i, column := range t.columns {
		left, top := chartLabel+i%across*(chartColumn+chartGap), chartHead+i/across*height
		low, high := t.extent(column)
		step := stepOf(high - low)
		at := func(v float64) float64 {
			return float64(left) + chartColumn*(min(max(v, low), high)-low)/(high-low)
		}
		bottom := top + chartHead/2 + len(t.rows)*chartRow
		words(&b, float64(left), top+12, "start", 12, column)
		for k := math.Ceil(low / step); k*step <= high+step/1e6; k++ {
			v := k * step
			stroke := "#ddd"
			if !t.absolute && math.Abs(v-1) < step/1e6 {
				stroke = "#888"
			}
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="%s"/>`+"\n", at(v), at(v), top+chartHead/2, bottom, stroke)
			words(&b, at(v), bottom+14, "middle", 10, fmt.Sprintf("%.3g", v))
		}
		for k, r := range t.rows {
			y := top + chartHead/2 + k*chartRow + chartRow/2
			if i%across == 0 {
				words(&b, chartLabel-10, y+4, "end", 12, r.arm)
			}
			x := r.cells[column]
			if !x.measured() {
				continue
			}
			v := x.interval()
			fmt.Fprintf(&b, `<line x1="%.1f" x2="%.1f" y1="%d" y2="%d" stroke="#26c" stroke-width="2"/>`+"\n", at(v.Low), at(v.High), y, y)
			fmt.Fprintf(&b, `<circle cx="%.1f" cy="%d" r="3.5" fill="#26c"><title>%s</title></circle>`+"\n", at(v.Median), y, escape(r.arm+", "+column+": "+v.String()))
		}
	}
	b.WriteString("</svg>\n")
	_, err := io.WriteString(w, b.String())
	return err
}

// extent returns the bounds of the axis of a column: all intervals are within, and so is 0 for
// absolute values. All columns of ratios have the same axis, which 1 is within.
func (t *table) extent(column string) (low, high float64) {
	if !t.absolute {
		low, high = 0.8, 1.1
	}
	for _, r := range t.rows {
		for _, c := range t.columns {
			if x := r.cells[c]; x.measured() && (!t.absolute || c == column) {
				v := x.interval()
				low, high = min(low, v.Low), max(high, v.High)
			}
		}
	}
	if high == low {
		high = low + 1
	}
	step := stepOf(high-low) / 2
	return math.Floor(low/step) * step, math.Ceil(high/step) * step
}

// stepOf returns a round distance for three to seven marks on an axis.
func stepOf(length float64) float64 {
	unit := math.Pow(10, math.Floor(math.Log10(length)))
	switch share := length / unit; {
	case share < 1.5:
		return unit / 5
	case share < 3.5:
		return unit / 2
	case share < 7:
		return unit
	}
	return 2 * unit
}

func words(b *strings.Builder, x float64, y int, anchor string, size int, text string) {
	fmt.Fprintf(b, `<text x="%.1f" y="%d" text-anchor="%s" font-size="%d">%s</text>`+"\n", x, y, anchor, size, escape(text))
}

func escape(text string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(text)) // a Builder does not fail
	return b.String()
}
