package nfnl

import (
	"encoding/binary"
	"slices"

	"golang.org/x/sys/unix"
)

// HeaderLen is the length of the headers of a message: nlmsghdr and nfgenmsg.
const HeaderLen = unix.NLMSG_HDRLEN + 4

// An Encoder appends netlink messages to B. The zero value is ready for use. It is not safe
// for concurrent use.
type Encoder struct {
	B           []byte
	last        int // offset of the last message that is not the end of a transaction
	transaction bool
}

// Reset discards all messages but keeps the memory.
func (e *Encoder) Reset() { e.B, e.last, e.transaction = e.B[:0], 0, false }

// Message begins a message for a family such as unix.AF_INET. End sets its
// length.
func (e *Encoder) Message(subsys, typ uint16, flags uint16, seq uint32, family byte) {
	e.last = len(e.B)
	e.header(subsys<<8|typ, flags, seq, family, 0)
}

func (e *Encoder) header(typ, flags uint16, seq uint32, family byte, resource uint16) {
	e.netlinkHeader(typ, flags, seq)
	e.B = append(e.B, family, unix.NFNETLINK_V0)
	e.B = binary.BigEndian.AppendUint16(e.B, resource)
}

func (e *Encoder) netlinkHeader(typ, flags uint16, seq uint32) {
	e.B = append(e.B, 0, 0, 0, 0)
	e.B = binary.NativeEndian.AppendUint16(e.B, typ)
	e.B = binary.NativeEndian.AppendUint16(e.B, flags)
	e.B = binary.NativeEndian.AppendUint32(e.B, seq)
	e.B = append(e.B, 0, 0, 0, 0)
}

// Begin begins a message of another protocol than nfnetlink. It returns the fixed header that
// the protocol has in front of the attributes, size zero bytes, to be filled in before the
// next call.
func (e *Encoder) Begin(typ, flags uint16, seq uint32, size int) []byte {
	e.last = len(e.B)
	e.netlinkHeader(typ, flags, seq)
	at := len(e.B)
	e.B = slices.Grow(e.B, size)[:at+size]
	clear(e.B[at:])
	return e.B[at:]
}

// End ends the message that Message or Begin began.
func (e *Encoder) End() {
	binary.NativeEndian.PutUint32(e.B[e.last:], uint32(len(e.B)-e.last))
}

// BeginTransaction appends the message that begins a transaction, for a subsystem that has
// them: it applies all messages or none. EndTransaction must follow the last message.
func (e *Encoder) BeginTransaction(subsys uint16, seq uint32) {
	e.last, e.transaction = len(e.B), true
	e.header(unix.NFNL_MSG_BATCH_BEGIN, unix.NLM_F_REQUEST, seq, unix.AF_UNSPEC, subsys)
	e.End()
}

// EndTransaction appends the end of a transaction. The kernel does not answer this message,
// so lastSeq still returns the one before it.
func (e *Encoder) EndTransaction(subsys uint16, seq uint32) {
	at := len(e.B)
	e.header(unix.NFNL_MSG_BATCH_END, unix.NLM_F_REQUEST, seq, unix.AF_UNSPEC, subsys)
	binary.NativeEndian.PutUint32(e.B[at:], HeaderLen)
}

// ack asks the kernel to acknowledge the last message even if it succeeds.
func (e *Encoder) ack() {
	flags := binary.NativeEndian.Uint16(e.B[e.last+6:])
	binary.NativeEndian.PutUint16(e.B[e.last+6:], flags|unix.NLM_F_ACK)
}

// firstSeq and lastSeq return the sequence numbers of the first and the last
// message.
func (e *Encoder) firstSeq() uint32 { return binary.NativeEndian.Uint32(e.B[8:]) }
func (e *Encoder) lastSeq() uint32  { return binary.NativeEndian.Uint32(e.B[e.last+8:]) }

// Attr appends the header of an attribute of n bytes. The caller appends the bytes and pads
// them with Pad.
func (e *Encoder) Attr(typ uint16, n int) {
	e.B = binary.NativeEndian.AppendUint16(e.B, uint16(4+n))
	e.B = binary.NativeEndian.AppendUint16(e.B, typ)
}

// Pad appends zeros up to the alignment of the next attribute.
func (e *Encoder) Pad() {
	for len(e.B)%4 != 0 {
		e.B = append(e.B, 0)
	}
}

// Nest begins a nested attribute and returns its offset for EndNest.
func (e *Encoder) Nest(typ uint16) int {
	at := len(e.B)
	e.Attr(typ|unix.NLA_F_NESTED, 0)
	return at
}

// EndNest ends the nested attribute at an offset.
func (e *Encoder) EndNest(at int) {
	binary.NativeEndian.PutUint16(e.B[at:], uint16(len(e.B)-at))
}

// Bytes appends an attribute with the value v.
func (e *Encoder) Bytes(typ uint16, v []byte) {
	e.Attr(typ, len(v))
	e.B = append(e.B, v...)
	e.Pad()
}

// U8 appends an attribute of one byte.
func (e *Encoder) U8(typ uint16, v byte) {
	e.Attr(typ, 1)
	e.B = append(e.B, v)
	e.Pad()
}

// BE16 appends an attribute in network byte order, as do BE32 and BE64.
func (e *Encoder) BE16(typ, v uint16) {
	e.Attr(typ, 2)
	e.B = binary.BigEndian.AppendUint16(e.B, v)
	e.Pad()
}

// BE32 is BE16 for 32 bits.
func (e *Encoder) BE32(typ uint16, v uint32) {
	e.Attr(typ, 4)
	e.B = binary.BigEndian.AppendUint32(e.B, v)
}

// BE64 is BE16 for 64 bits.
func (e *Encoder) BE64(typ uint16, v uint64) {
	e.Attr(typ, 8)
	e.B = binary.BigEndian.AppendUint64(e.B, v)
}

// NE32 is BE32 in the byte order of the host, as rtnetlink wants it.
func (e *Encoder) NE32(typ uint16, v uint32) {
	e.Attr(typ, 4)
	e.B = binary.NativeEndian.AppendUint32(e.B, v)
}

// Str appends s with the NUL that the kernel requires.
func (e *Encoder) Str(typ uint16, s string) {
	e.Attr(typ, len(s)+1)
	e.B = append(e.B, s...)
	e.B = append(e.B, 0)
	e.Pad()
}
