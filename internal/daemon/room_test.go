package daemon

import (
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/ctwatch"
)

// Fails when anchors count as entries of others, and when one of the bounds is left out.
func TestRoomForExpectations(t *testing.T) {
	for name, tt := range map[string]struct {
		expectations, entries, most int
		anchors                     int
		want                        cone.Room
	}{
		"large tables":                   {100_000, 1000, 1 << 20, 0, cone.Room{New: 75_000, Live: 75_000, Lack: cone.ReasonTableFull}},
		"a small expectation table":      {1024, 1000, 1 << 18, 0, cone.Room{New: 768, Live: 768, Lack: cone.ReasonTableFull}},
		"512 MB":                         {100_000, 10, 4096, 0, cone.Room{New: 819, Live: 819, Lack: cone.ReasonNoRoom}},
		"conntrack without a bound":      {1024, 1 << 20, 0, 0, cone.Room{New: 768, Live: 768, Lack: cone.ReasonTableFull}},
		"anchors alone":                  {100_000, 819, 4096, 819, cone.Room{New: 819, Live: 819, Lack: cone.ReasonNoRoom}},
		"others beside them":             {100_000, 3276, 4096, 276, cone.Room{New: 276, Live: 686, Lack: cone.ReasonNoRoom}},
		"others fill it":                 {100_000, 4096, 4096, 400, cone.Room{New: 0, Live: 0, Lack: cone.ReasonNoRoom}},
		"no more new ones":               {100_000, 3500, 4096, 0, cone.Room{New: 0, Live: 186, Lack: cone.ReasonNoRoom}},
		"small tables and many entries":  {1024, 250_000, 1 << 18, 0, cone.Room{New: 0, Live: 0, Lack: cone.ReasonNoRoom}},
		"more anchors than were counted": {100_000, 10, 4096, 20, cone.Room{New: 819, Live: 819, Lack: cone.ReasonNoRoom}},
	} {
		t.Run(name, func(t *testing.T) {
			s := space{tt.expectations, ctwatch.Table{Entries: tt.entries, Max: tt.most}}
			if got := s.room(tt.anchors); got != tt.want {
				t.Errorf("%+v, want %+v", got, tt.want)
			}
		})
	}
}
