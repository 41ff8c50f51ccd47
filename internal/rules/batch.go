//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// batch is how many elements go into one transaction. Its cost is shared; a
// socket's buffer must have room for as many answers.
const batch = 256

// A batcher sends messages about elements of sets, one batch at a time. What it
// needs is kept, so that a batch costs no allocation.
type batcher struct {
	w      *writer
	enc    nfnl.Encoder
	errs   [batch]error // of the elements that were refused
	first  uint32
	per    uint32 // messages for each element
	failed func(seq uint32, err error)
}

func (b *batcher) begin(w *writer) {
	b.w = w
	b.failed = func(seq uint32, err error) {
		// What comes later fails for what came first.
		if i := (seq - b.first - 1) / b.per; i < batch && b.errs[i] == nil {
			b.errs[i] = err
		}
	}
}

// transact sends what encode makes of es, at most batch, as one transaction, leaving
// out what has an error in b.errs and what the kernel refuses. That is in b.errs
// afterwards.
func transact[E any](b *batcher, es []E, per uint32, encode func(seq uint32, e *E)) {
	b.per = per
	b.w.Lock()
	defer b.w.Unlock()
	for {
		b.enc.Reset()
		messages := len(es) * int(per)
		b.first = b.w.batch.NextSeq(messages + 2)
		b.enc.BeginTransaction(unix.NFNL_SUBSYS_NFTABLES, b.first)
		sent := 0
		for i := range es {
			if b.errs[i] == nil {
				encode(b.first+1+uint32(i)*per, &es[i])
				sent++
			}
		}
		if sent == 0 {
			return
		}
		b.enc.EndTransaction(unix.NFNL_SUBSYS_NFTABLES, b.first+1+uint32(messages))
		b.w.commits++
		err := b.w.batch.Exchange(&b.enc, b.failed, nil)
		done := 0
		for i := range es {
			switch {
			case b.errs[i] != nil:
			case err != nil:
				b.errs[i] = err // nobody knows what the kernel did
			default:
				done++
			}
		}
		if done == sent || err != nil {
			return
		}
	}
}
