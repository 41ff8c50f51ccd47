package main

import (
	"os"
	"os/signal"
	"syscall"
)

// signals are those that "run" handles and that by default end a program. main catches them before
// anything else, because a configuration may take seconds to read. Until the daemon is there they
// wait.
type signals struct{ hangup, upgrade chan os.Signal }

func catchSignals() *signals {
	s := &signals{make(chan os.Signal, 1), make(chan os.Signal, 1)}
	signal.Notify(s.hangup, syscall.SIGHUP)
	signal.Notify(s.upgrade, syscall.SIGUSR1)
	return s
}

// release lets them end the program again. Commands other than "run" call it.
func (s *signals) release() {
	signal.Stop(s.hangup)
	signal.Stop(s.upgrade)
}
