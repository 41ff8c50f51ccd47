package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// options are what the command line says.
type options struct {
	exe    string
	out    string
	tables string
	rounds int
	sizes  []int // numbers of permissions, ascending
	flows  int   // new flows in a turn
	// startFlows is how many flows there are at a start, ascending.
	startFlows []int
	disturbed  bool
	log        io.Writer
	// stopped returns an error after an interrupt: the program then removes its gateways and
	// ends, because they would outlive it.
	stopped func() error
}

// tables are all that can be measured, in the order of the page.
var tables = []struct {
	key     string
	measure func(*options) ([]*table, error)
}{
	{"a", established},
	{"b", newFlows},
	{"c", children},
	{"d", latency},
	{"e", starts},
	{flowtableKey, flowtables},
	{"h", parts},
}

// flowtableKey is the table for kernels with flowtables alone.
const flowtableKey = "g"

// growthKey is the table that is calculated from others.
const growthKey = "f"

func main() {
	if os.Getenv(minimalEnv) != "" {
		if err := minimalLoop(); err != nil {
			fmt.Fprintln(os.Stderr, "minimal loop:", err)
			os.Exit(1)
		}
		return
	}
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout)
	cancel()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, log io.Writer) error {
	o, err := parse(args, log)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	o.stopped = func() error { return context.Cause(ctx) }
	if err := o.race(nil).check(); err != nil {
		return err
	}
	_, sender := cpus()
	if err := pinSelf(sender); err != nil {
		return err
	}
	began := time.Now()
	var measured []*table
	for _, t := range tables {
		if !strings.Contains(o.tables, t.key) {
			continue
		}
		x, err := t.measure(o)
		if err != nil {
			err = fmt.Errorf("table %s: %w", t.key, err)
			if len(measured) > 0 {
				err = errors.Join(err, o.write(measured))
			}
			return err
		}
		measured = append(measured, x...)
	}
	if strings.Contains(o.tables, growthKey) {
		measured = append(measured, growth(o, measured))
	}
	if err := o.write(measured); err != nil {
		return err
	}
	fmt.Fprintf(log, "measured in %v, written to %s\n", time.Since(began).Round(time.Second), o.out)
	return nil
}

func parse(args []string, log io.Writer) (*options, error) {
	o := &options{log: log, stopped: func() error { return nil }}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	f.SetOutput(log)
	all := ""
	for _, t := range tables {
		all += t.key
	}
	all += growthKey
	usual := strings.ReplaceAll(all, flowtableKey, "")
	f.StringVar(&o.exe, "exe", "bin/conenatd", "conenatd")
	f.StringVar(&o.out, "out", "docs/results/bench.md", "`file` to write; charts go beside it")
	f.StringVar(&o.tables, "tables", usual, "`letters` of the tables to measure; "+flowtableKey+" needs a kernel with flowtables")
	f.IntVar(&o.rounds, "rounds", 9, "quads A B B A for each arm; 6 are the least for a verdict")
	sizes := f.String("sizes", "1,10000,100000", "`numbers` of permissions for tables a and c")
	startFlows := f.String("start-flows", "10000,100000", "`numbers` of flows for table e")
	f.IntVar(&o.flows, "flows", 4000, "new flows in a turn, at most 8000")
	f.BoolVar(&o.disturbed, "disturbed", false, "measure although somebody listens to conntrack events; every row is marked")
	if err := f.Parse(args); err != nil {
		return nil, err
	}
	if f.NArg() > 0 {
		return nil, fmt.Errorf("unknown argument %q", f.Arg(0))
	}
	var err error
	if o.sizes, err = numbers("-sizes", *sizes); err != nil {
		return nil, err
	}
	if o.startFlows, err = numbers("-start-flows", *startFlows); err != nil {
		return nil, err
	}
	if bad := strings.Trim(o.tables, all); bad != "" || o.tables == "" {
		return nil, fmt.Errorf("-tables: want letters of %q, got %q", all, o.tables)
	}
	if strings.Contains(o.tables, growthKey) && !strings.ContainsAny(o.tables, "ace") {
		return nil, fmt.Errorf("-tables: %s is calculated from a, c and e: name one of them, too", growthKey)
	}
	if o.rounds < 1 || o.flows < 1 || o.flows > 8*knownFlows*2 {
		return nil, errors.New("-rounds and -flows must be at least 1, and -flows at most 8000")
	}
	exe, err := filepath.Abs(o.exe)
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(exe); err != nil {
		return nil, fmt.Errorf("-exe: %w: build it with \"make build\"", err)
	}
	o.exe = exe
	return o, nil
}

// numbers reads numbers in ascending order.
func numbers(name, list string) (all []int, err error) {
	for s := range strings.SplitSeq(list, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > 1_000_000 {
			return nil, fmt.Errorf("%s: %q is no number from 1 to 1000000", name, s)
		}
		all = append(all, n)
	}
	slices.Sort(all)
	return all, nil
}

// race returns a race with the options' settings.
func (o *options) race(cells []cell) *race {
	nothing := func(*gateway) error { return nil }
	return &race{cells: cells, begin: nothing, end: nothing, clear: nothing, rounds: o.rounds, disturbed: o.disturbed, look: undisturbed, patience: 2 * time.Minute, stopped: o.stopped, log: o.log}
}

// gateways makes a gateway for each arm and prepares it. Those without a listener come first:
// their flows must not have room for events. The caller calls done when it has measured, also
// after an error.
func (o *options) gateways(arms []arm, prepare func(*gateway) error) (_ []*gateway, done func(), err error) {
	var all []*gateway
	done = func() {
		for _, g := range all {
			if err := g.Close(); err != nil {
				fmt.Fprintln(o.log, "remove gateway:", err)
			}
		}
	}
	for _, a := range arms {
		if err := o.stopped(); err != nil {
			return nil, done, err
		}
		g, err := newGateway(a, o.exe)
		if err != nil {
			return nil, done, err
		}
		all = append(all, g)
		if err := prepare(g); err != nil {
			return nil, done, fmt.Errorf("%s: %w", a.name, err)
		}
	}
	return all, done, nil
}

// mark marks rows.
func (o *options) mark() string {
	if o.disturbed {
		return " [disturbed]"
	}
	return ""
}

// write writes the page and its charts.
func (o *options) write(measured []*table) error {
	if len(measured) == 0 {
		return errNothing
	}
	mark := o.mark()
	var page bytes.Buffer
	fmt.Fprintf(&page, intro, time.Now().UTC().Format(time.DateOnly), commit(), machine(), 100*confidence, o.rounds)
	if o.disturbed {
		page.WriteString(disturbedNote)
	} else {
		page.WriteString(undisturbedNote)
	}
	for _, t := range measured {
		if err := t.write(&page, mark); err != nil {
			return err
		}
		var drawing bytes.Buffer
		if err := t.chart(&drawing, mark); err != nil {
			return err
		}
		path := strings.TrimSuffix(o.out, ".md") + "-" + t.key + ".svg"
		if err := os.WriteFile(path, drawing.Bytes(), 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(o.out, page.Bytes(), 0o644)
}

const intro = `# What conenatd costs

Written by ` + "`sudo make bench`" + ` on %s, commit %s. %s.

Ratios are against the arm that the head of a table names, in the same run: 0.90 means that the
sender's CPU carries 90 %% as many packets a second. Arms are measured in quads A B B A, with a
ratio from each; a figure is the median of all quads, with a %.0f %% confidence interval from
order statistics (%d quads). A star says that there were too few for that: then the extremes.
A/A is the same set-up against itself; what it misses 1 by widens intervals before they are
compared with a goal. Where an interval includes both answers there is no verdict.
[e2e/bench](../../e2e/bench/doc.go) says more.
`

const undisturbedNote = `
Nobody else on the machine listened to conntrack events.
`

const disturbedNote = `
**Disturbed:** others may have listened to conntrack events, so the kernel may have built events
for every arm. No verdicts.
`

// commit names what was measured. The files may belong to another user than root.
func commit() string {
	out, err := exec.Command("git", "-c", "safe.directory=*", "describe", "--always", "--dirty", "--exclude=*").Output()
	if err != nil {
		return "unknown"
	}
	return string(bytes.TrimSpace(out))
}
