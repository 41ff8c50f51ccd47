package daemon

import (
	"testing"
	"testing/synctest"
)

// While another program reads or deletes flows, the kernel does not answer for their statistics.
//
// Fails when a status waits for such an answer for as long as it takes.
func TestStatusDoesNotWaitForTheKernel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &shared{looks: make(chan func(*reconciler)), ended: make(chan struct{})}
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			<-s.looks
			<-stop // the reconcile waits for the kernel
		}()
		s.readCounters()
	})
}
