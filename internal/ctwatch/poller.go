package ctwatch

import "time"

// A Poller reads a Statistics in a goroutine of its own, one reading at a time, so that its caller
// need not wait. Only one goroutine may use it.
type Poller struct {
	kernel  asked
	pending chan Reading // of the goroutine that reads; nil if there is none
	last    Reading
}

// asked is a *Statistics, except in tests.
type asked interface {
	Table() (Table, error)
	Counts() (Counts, error)
	Close() error
}

// A Reading is what a Statistics says at one time.
type Reading struct {
	Table     Table
	Counts    Counts
	Err       error // of Table
	CountsErr error // Counts are the last ones then
}

// NewPoller returns a Poller of kernel, a *Statistics, which it closes with itself.
func NewPoller(kernel asked) *Poller { return &Poller{kernel: kernel} }

// Read returns what the kernel says now, or if that takes longer than wait what it said last. It
// reports whether this is new.
func (p *Poller) Read(wait <-chan time.Time) (_ Reading, isNew bool) {
	select {
	case r := <-p.pending: // it answers an earlier call: keep it, and ask again
		isNew = p.take(r)
	default:
	}
	if p.pending == nil {
		answer := make(chan Reading, 1)
		p.pending = answer
		go func() {
			var r Reading
			if r.Table, r.Err = p.kernel.Table(); r.Err == nil {
				r.Counts, r.CountsErr = p.kernel.Counts()
			}
			answer <- r
		}()
	}
	select {
	case r := <-p.pending:
		p.take(r)
		return r, true
	case <-wait:
		return p.last, isNew
	}
}

// take ends the reading under way. It reports whether r is one to remember.
func (p *Poller) take(r Reading) bool {
	p.pending = nil
	if r.Err == nil {
		p.last = r
	}
	return r.Err == nil
}

// Close waits for the reading under way, which has a deadline.
func (p *Poller) Close() error {
	if p.pending != nil {
		<-p.pending
	}
	return p.kernel.Close()
}
