package ctwatch

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/nfnl"
)

func TestTableCountsEntriesOfAllKinds(t *testing.T) {
	enterNetNS(t)
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		t.Fatal(err)
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	q := dialQueries(t, Config{})
	for _, want := range []Table{{0, most}, {1, most}, {3, most}} {
		switch want.Entries {
		case 1:
			makeAnchor(t, 0, 5060, false)
		case 3:
			makeAnchor(t, 0, 5061, false)
			makeAnchor(t, 0, 5062, false)
		}
		if got, err := q.Table(); err != nil || got != want {
			t.Errorf("%+v, error %v; want %+v", got, err, want)
		}
	}
}

func TestTableThatIsNoTable(t *testing.T) {
	for _, msg := range [][]byte{
		{0, 0, 0},
		{0, 0, 0, 0, 1, 0, 0, 0},
		append(make([]byte, nfnl.FamilyHeaderLen), attr(ctaStatsGlobalEntries, 1, 2)...),
	} {
		if got, err := parseTable(msg); !errors.Is(err, errMalformed) {
			t.Errorf("%x: %+v, error %v", msg, got, err)
		}
	}
}
