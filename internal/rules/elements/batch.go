package elements

import (
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// batch is how many elements go into one transaction. They share its cost, but the socket
// buffer must have room for as many answers.
const batch = 256

// A batcher sends messages about elements of sets, one batch at a time. It keeps its
// buffers, so that a batch allocates nothing.
type batcher struct {
	w      *Writer
	family byte // of the table
	enc    nfnl.Encoder
	errs   [batch]error // of the elements that the kernel refused
	first  uint32
	per    uint32 // messages per element
	failed func(seq uint32, err error)
	told   func(typ uint16, body []byte)
}

func (b *batcher) begin(w *Writer) {
	b.w, b.family = w, unix.AF_INET
	b.told = func(typ uint16, body []byte) {
		if id, ok := nfnl.GenerationOf(typ, body); ok {
			w.generations.ours(id)
		}
	}
	b.failed = func(seq uint32, err error) {
		// The first error of an element is the cause; later messages fail because of it.
		if i := (seq - b.first - 1) / b.per; i < batch && b.errs[i] == nil {
			b.errs[i] = err
		}
	}
}

// transact sends what encode makes of es, at most batch elements, as one transaction. It
// leaves out elements that have an error in b.errs, and repeats the transaction without
// those that the kernel refuses. Their errors are in b.errs afterwards.
func transact[E any](b *batcher, es []E, per uint32, encode func(seq uint32, e *E)) {
	b.per = per
	b.w.Lock()
	defer b.w.Unlock()
	for {
		b.enc.Reset()
		messages := len(es) * int(per)
		b.first = b.w.batch.NextSeq(messages + 2)
		b.enc.BeginTransaction(unix.NFNL_SUBSYS_NFTABLES, b.first)
		b.askGeneration()
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
		err := b.w.batch.Exchange(&b.enc, b.failed, b.told)
		done := 0
		for i := range es {
			switch {
			case b.errs[i] != nil:
			case err != nil:
				b.errs[i] = err // it is unknown what the kernel did
			default:
				done++
			}
		}
		if done == sent || err != nil {
			return
		}
	}
}

// inBatches sends what encode makes of es, any number of them. It calls done for each one, with its
// index and the kernel's error.
func inBatches[E any](b *batcher, es []E, per uint32, encode func(seq uint32, e *E), done func(i int, err error)) {
	for base := 0; base < len(es); base += batch {
		part := es[base:min(base+batch, len(es))]
		clear(b.errs[:])
		transact(b, part, per, encode)
		for i := range part {
			done(base+i, b.errs[i])
		}
	}
}

// askGeneration asks the kernel for the number of the transaction that begins. The kernel
// tells the number if the first message has the flag NLM_F_ECHO, but would echo a message
// about an element, too. So this message asks to create our table, which exists already,
// and changes nothing. If the table is missing, the messages that follow fail. The message
// has the sequence number of the transaction, so its refusal counts as that of the
// transaction.
func (b *batcher) askGeneration() {
	b.enc.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_NEWTABLE, unix.NLM_F_REQUEST|unix.NLM_F_ECHO, b.first, b.family)
	b.enc.Str(unix.NFTA_TABLE_NAME, b.w.table)
	b.enc.End()
}

// openElement begins a message of type typ about one element of a set. The caller appends
// the element's attributes and calls closeElement. NLM_F_REQUEST and, for a new element,
// NLM_F_CREATE are added to flags.
func (b *batcher) openElement(set string, seq uint32, typ, flags uint16) (list, element int) {
	flags |= unix.NLM_F_REQUEST
	if typ == unix.NFT_MSG_NEWSETELEM {
		flags |= unix.NLM_F_CREATE
	}
	e := &b.enc
	e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, flags, seq, b.family)
	e.Str(unix.NFTA_SET_ELEM_LIST_TABLE, b.w.table)
	e.Str(unix.NFTA_SET_ELEM_LIST_SET, set)
	list = e.Nest(unix.NFTA_SET_ELEM_LIST_ELEMENTS)
	return list, e.Nest(unix.NFTA_LIST_ELEM)
}

// data appends a key or a value to the open element.
func (b *batcher) data(typ uint16, value []byte) {
	nest := b.enc.Nest(typ)
	b.enc.Bytes(unix.NFTA_DATA_VALUE, value)
	b.enc.EndNest(nest)
}

// closeElement ends the message of type typ that openElement began. A new element gets the
// timeout; 0 stands for that of its set, without which it never expires.
func (b *batcher) closeElement(list, element int, typ uint16, timeout time.Duration) {
	e := &b.enc
	if timeout > 0 && typ == unix.NFT_MSG_NEWSETELEM {
		e.BE64(unix.NFTA_SET_ELEM_TIMEOUT, uint64(timeout.Milliseconds()))
	}
	e.EndNest(element)
	e.EndNest(list)
	e.End()
}
