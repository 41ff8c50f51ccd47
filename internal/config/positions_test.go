package config

import (
	"maps"
	"math"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"golang.org/x/sys/unix"
)

// Fails when a bracket, a quote or a hash within a string or a comment counts, when items of
// an array or tables of subnets are mixed up, and when columns count bytes.
func TestKeysAndValuesAreFoundWhereTheyStand(t *testing.T) {
	data := strings.Join([]string{
		"# a [ comment",
		"a = [ # [",
		" 1, ']', {b = \"}\", c = [\"]\"]},",
		"] # ]",
		"b = \"\"\"",
		"\\\"\"\"",
		"[\"\"\"\"\"",
		"  c = '''",
		"\\'''' # '",
		"\"d\\\"\u00e9\" = 'e\\'",
		"\"\u00e9\".x = {\"\u00e9\" = 1 , y = [2,3]}",
		"[[subnet]] # first",
		"  prefix = [\"\u00e9\", 2]",
		"[ subnet . x ]",
		"y = 1979-05-27 07:32:00",
		"[[subnet]]",
		"routed.x = true",
	}, "\n")
	if err := toml.Unmarshal([]byte(data), new(map[string]any)); err != nil {
		t.Fatal(err)
	}
	at := func(line, column int) position { return position{line, column} }
	want := positions{
		{0, "a"}:         {at(2, 1), at(2, 5), []position{at(3, 2), at(3, 5), at(3, 10)}},
		{0, "b"}:         {at(5, 1), at(5, 5), nil},
		{0, "c"}:         {at(8, 3), at(8, 7), nil},
		{0, "d\"\u00e9"}: {at(10, 1), at(10, 10), nil},
		{0, "\u00e9"}:    {at(11, 1), at(11, 9), nil},
		{0, "subnet"}:    {at(12, 1), at(0, 0), nil},
		{1, ""}:          {at(12, 1), at(0, 0), nil},
		{1, "prefix"}:    {at(13, 3), at(13, 12), []position{at(13, 13), at(13, 18)}},
		{1, "x"}:         {at(14, 1), at(0, 0), nil},
		{2, ""}:          {at(16, 1), at(0, 0), nil},
		{2, "routed"}:    {at(17, 1), at(17, 12), nil},
	}
	got := findPositions(data)
	same := func(a, b spot) bool {
		return a.key == b.key && a.value == b.value && slices.Equal(a.items, b.items)
	}
	if !maps.EqualFunc(got, want, same) {
		t.Errorf("\ngot  %v\nwant %v", got, want)
	}
}

// Fails when each item of a line is counted from the line's beginning: sixteen times the
// items then cost about 256 times the CPU time.
func TestLongLinesAreScannedInLinearTime(t *testing.T) {
	const few, times, most = 4000, 16, 64
	cost := func(items int) time.Duration {
		data := "exclude_ports = [" + strings.Repeat("1, ", items) + "]"
		least := time.Duration(math.MaxInt64)
		for range 5 {
			before := threadTime(t)
			found := findPositions(data)
			least = min(least, threadTime(t)-before)
			if got := len(found[place{0, "exclude_ports"}].items); got != items {
				t.Fatalf("found %d items of %d", got, items)
			}
		}
		return least
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if a, b := cost(few), cost(few*times); b > a*most {
		t.Errorf("%d items cost %v of CPU time, and %d times as many %v", few, a, times, b)
	}
}

// threadTime returns the CPU time of the calling thread.
func threadTime(t *testing.T) time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &ts); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ts.Nano())
}

func FuzzLoad(f *testing.F) {
	f.Add(every)
	f.Add("subnet = [{prefix = \"10.0.0.0/8\"}]\n[[x]]\n[x.y]\n\"a\\nb\" = '''\n'''")
	f.Add("[[subnet]]\n[subnet.subnet]\n[[subnet]]\nprefix = 1979-05-27T07:32:00Z\nrouted.x = nan")
	f.Fuzz(func(t *testing.T, data string) {
		var root map[string]any
		if toml.Unmarshal([]byte(data), &root) == nil {
			found := findPositions(strings.TrimPrefix(data, "\ufeff"))
			for key := range root {
				if found[place{0, key}].key.line == 0 {
					t.Errorf("no line for %q", key)
				}
			}
		}
		c, err := whole("f.toml", data)
		if err == nil {
			if c.Lifetime < time.Second || c.EventBuffer < 64<<10 {
				t.Errorf("accepted %+v", c)
			}
			return
		}
		for line := range strings.Lines(err.Error()) {
			if !strings.HasPrefix(line, "f.toml:") {
				t.Errorf("a line without the file name: %q", err)
			}
		}
	})
}
