package evidence

import (
	"testing"
	"time"
)

func TestEvidenceAges(t *testing.T) {
	var w Witness
	tell := func(now time.Duration, admitted, passed uint64, wantPass, wantKnown bool) {
		t.Helper()
		w.Read(now, admitted, passed, passed)
		w.SawFlows()
		if pass, known := w.Passes(); pass != wantPass || known != wantKnown {
			t.Errorf("at %v: passes %v, known %v; %+v", now, pass, known, w)
		}
	}
	tell(0, 1000, 1000, false, false) // before us
	tell(1, 1002, 1000, false, false)
	tell(2, 1010, 1000, false, true)
	tell(3, 1500, 1490, true, true) // the firewall was mended
	tell(Memory+2, 1500, 1490, true, true)
	tell(Memory+3, 1500, 1490, false, false)
	tell(Memory+4, 1501, 1491, true, true)
}

// Packets that come in a zone are told until nothing has come there for a minute and an expectation has
// admitted somebody since, or for an hour.
//
// Fails when a single packet is told longer, when an earlier child counts, and when the packets of one
// of two uplinks are told by turns.
func TestPacketsInAZoneAreForgotten(t *testing.T) {
	var z InZone
	tell := func(now time.Duration, packets, expected uint64, want bool) {
		t.Helper()
		z.Packets.Read(packets)
		z.Note(now, true, expected)
		if z.Lately != want {
			t.Errorf("at %v: told %v, want %v; %+v", now, z.Lately, want, z)
		}
	}
	tell(0, 7, 5, false) // before us
	tell(1, 8, 6, true)
	tell(zoneQuiet+1, 8, 6, true) // nobody else came
	tell(zoneQuiet+2, 8, 7, false)
	tell(zoneQuiet+3, 8, 8, false)
	tell(zoneQuiet+4, 9, 8, true)
	tell(zoneQuiet+5, 9, 9, true) // perhaps by another uplink
	tell(2*zoneQuiet, 10, 9, true)
	tell(3*zoneQuiet-1, 10, 10, true)
	tell(3*zoneQuiet, 10, 10, false)
	tell(4*zoneQuiet, 11, 10, true)
	tell(4*zoneQuiet+Memory-1, 11, 10, true)
	tell(4*zoneQuiet+Memory, 11, 10, false)
}

// Many children come, and all pass, while rules change again and again: flows are not dumped, and
// older children are halved.
//
// Fails when the halves of those that are pending and of those that passed are not the same.
func TestPendingChildrenAgeWithTheOthers(t *testing.T) {
	var w Witness
	w.Read(0, 0, 0, 0)
	w.Read(1, 400, 400, 400)
	w.SawFlows()
	for now := range time.Duration(4) {
		w.Read(2+now, 1400, 1400, 1400)
	}
	w.SawFlows()
	w.Read(6, 1400, 1400, 1400)
	if 10*w.through < 9*w.lately {
		t.Errorf("%d of %d passed", w.through, w.lately)
	}
}

// Fails when children that the rules dropped speak against those that the user mended, or when
// those of one peer do that are lost beside others that pass.
func TestChildrenThatDoNotContradictTheRules(t *testing.T) {
	lost := func(accepted bool, passed uint64) *Witness {
		w := new(Witness)
		w.AcceptedNow(accepted)
		w.Read(0, 0, 0, 0)
		w.Read(1, 50, passed, passed)
		w.SawFlows()
		w.Judge(true)
		return w
	}
	if !lost(true, 0).Contradicts() {
		t.Error("all are lost")
	}
	if lost(true, 1).Contradicts() {
		t.Error("one passed")
	}
	w := lost(false, 0)
	w.AcceptedNow(true)
	w.Judge(true)
	if w.Contradicts() {
		t.Error("they were lost by other rules")
	}
}
