package episodes

import (
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/episodes/episodestest"
)

func TestWarningIsLoggedWhenItArisesAndWhenItIsOver(t *testing.T) {
	log, lines := episodestest.Logged()
	w := NewWarner(log)
	now := time.Hour
	tell := func(want string, all ...control.Finding) {
		t.Helper()
		w.Tell(now, all)
		if got := lines(); got != want {
			t.Errorf("logged %q, want %q", got, want)
		}
	}
	pool := func(text string) control.Finding { return control.Finding{ID: "pool_used_up", Text: text} }
	other := control.Finding{ID: "no_outside_link", Text: "no outside link"}
	const warn, info = "level=WARN msg=", "level=INFO msg="

	tell("")
	tell(warn+"\"3 flows\"\n", pool("3 flows"))
	tell("", pool("4 flows")) // only a number changed
	tell(warn+"\"no outside link\"\n", other, pool("4 flows"))
	now += time.Second
	tell(info+"\"no longer: 4 flows\"\n", other)
	tell("", other, pool("5 flows")) // again, within a minute
	tell("", other)                  // and nobody was told, so it is not over
	now += time.Minute
	tell(warn+"\"6 flows\"\n", other, pool("6 flows"))
	now += time.Hour
	tell("", other, pool("7 flows"))
	tell(info + "\"no longer: no outside link\"\n" + info + "\"no longer: 7 flows\"\n")
	tell(warn+"\"8 flows\"\n", pool("8 flows")) // it was logged an hour ago
	tell(info + "\"no longer: 8 flows\"\n")
	now += time.Hour
	tell("")
	if len(w.said)+len(w.holds) > 0 {
		t.Errorf("kept: %v, %v", w.said, w.holds)
	}
}
