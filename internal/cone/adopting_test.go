package cone

import (
	"slices"
	"testing"
)

// While permissions of an earlier daemon are adopted, one that a new flow earns may be there
// already, so it is renewed, and a child may belong to one that is not known yet.
//
// Fails when either does not depend on SetAdopting.
func TestWhilePermissionsAreAdopted(t *testing.T) {
	for adopting, want := range map[bool]struct{ flow, child []OpKind }{
		true:  {[]OpKind{Grant, Renew}, nil},
		false: {[]OpKind{Grant}, []OpKind{DropUnanswered}},
	} {
		d := newDesk(t, nil)
		d.m.SetAdopting(adopting)
		d.m.FlowSeen(0, d.translated("10.47.11.109:1", "203.0.113.5:9"))
		if got := d.carry(); !slices.Equal(got, want.flow) {
			t.Errorf("adopting %v: a flow leads to %v, want %v", adopting, got, want.flow)
		}
		if got := d.child(1, d.translated("10.47.11.109:2", "203.0.113.5:9"), 77); !slices.Equal(got, want.child) {
			t.Errorf("adopting %v: a child leads to %v, want %v", adopting, got, want.child)
		}
	}
}
