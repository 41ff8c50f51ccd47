package cone

import (
	"slices"
	"testing"
)

// A rule of the user's may set the label of our children on all flows. Then his own forwarded
// flows are none, and the user is told.
//
// Fails when a labelled flow is always taken for a child, or when the warning outlasts the flows
// that show it.
func TestLabelThatOthersSetMakesNoChildren(t *testing.T) {
	d := newDesk(t, mapped)
	forwarded := &Flow{
		ID: 99, Status: StatusDstNAT, Labelled: true,
		Src: ep("203.0.113.5:9000"), Dst: ep("198.51.100.1:6000"), ReplySrc: ep("10.47.11.110:6000"), ReplyDst: ep("203.0.113.5:9000"),
	}
	if kinds := d.snapshot(1, forwarded); !slices.Contains(kinds, DropUnanswered) || d.m.LabelTaken() {
		t.Errorf("a child without a permission: %v, label taken: %v", kinds, d.m.LabelTaken())
	}
	own := d.translated("10.47.11.109:5060", "203.0.113.5:5060")
	own.Labelled = true
	for now := range 2 {
		if kinds := d.snapshot(2, forwarded, own); slices.Contains(kinds, DropUnanswered) || !d.m.LabelTaken() {
			t.Errorf("look %d, a host's own flow is labelled, too: %v, label taken: %v", now, kinds, d.m.LabelTaken())
		}
	}
	if kinds := d.seen(3, forwarded); slices.Contains(kinds, DropUnanswered) {
		t.Errorf("the forwarded flow again: %v", kinds)
	}
	own.Labelled = false
	d.snapshot(4, own)
	if d.m.LabelTaken() {
		t.Error("no flow has the label any more, and it still counts as taken")
	}
}
