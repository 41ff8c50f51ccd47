package daemon

import (
	"errors"
	"testing"
	"time"

	"github.com/conenatd/conenatd/internal/budget"
)

func TestReadyAfterAGoodReconcileOnly(t *testing.T) {
	var f firstReconcile
	fails := errors.New("busy")
	last := time.Duration(0)
	for range firstTries - 1 {
		wait, err := f.tried(fails)
		if wait <= last || wait > 10*time.Second || err != nil {
			t.Fatalf("wait %v after %v, %v", wait, last, err)
		}
		last = wait
	}
	if wait, err := f.tried(nil); wait != 0 || err != nil {
		t.Errorf("a good one: wait %v, %v", wait, err)
	}
	if _, err := f.tried(fails); !errors.Is(err, fails) {
		t.Errorf("the last bad one: %v", err)
	}
}

func TestReconcilesInAHurryAreApart(t *testing.T) {
	for cost, want := range map[time.Duration]time.Duration{
		0: time.Second, 10 * time.Millisecond: time.Second, 100 * time.Millisecond: 3 * time.Second,
		time.Second: 10 * time.Second, 3 * time.Second: 12 * time.Second,
	} {
		if got := budget.Rest(cost); got != want {
			t.Errorf("%v after one of %v, want %v", got, cost, want)
		}
	}
}

// A process that was stopped while it read a dump shows the flows as they were before.
//
// Fails when a piece counts from its own beginning, or from the dump's.
func TestPieceOfADumpIsAsOldAsTheOneBefore(t *testing.T) {
	age := beginDump(5 * time.Second)
	for _, piece := range []struct{ read, late time.Duration }{
		{6 * time.Second, 0},                 // takes a second
		{20 * time.Second, 15 * time.Second}, // may have been filled at 5 s; begun at 6 s
		{21 * time.Second, 15 * time.Second}, // may have been filled at 6 s
		{22 * time.Second, 0},
	} {
		if late := age.ofPiece(piece.read); late != piece.late {
			t.Errorf("read at %v: %v late, want %v", piece.read, late, piece.late)
		}
	}
}
