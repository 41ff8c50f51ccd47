package main

import (
	"errors"
	"testing"
)

// Fails when a line of an error has no priority in the journal, or has one on a terminal.
func TestEachLineOfAnErrorHasAPriorityInTheJournal(t *testing.T) {
	err := errors.Join(errors.New("c.toml:1:1: a"), errors.New("c.toml:2:1: b"))
	if got, want := errorText(err, true), "<3>conenatd: c.toml:1:1: a\n<3>c.toml:2:1: b\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	if got, want := errorText(err, false), "conenatd: c.toml:1:1: a\nc.toml:2:1: b\n"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}
