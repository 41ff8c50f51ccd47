package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/pion/stun/v3"
)

// Retransmission as in RFC 8489 section 6.2.1, but with fewer packets: silence is a usual
// answer here, and nobody wants to wait 40 s for each. Packets leave at 0, 1, 3 and 7 RTO,
// and the last one is waited for like the one before.
const (
	initialRTO = 500 * time.Millisecond // RTO
	packets    = 4                      // Rc
)

// The flags of CHANGE-REQUEST (RFC 5780 section 7.2).
const (
	changeIP   = 0x04
	changePort = 0x02
)

// A request is a Binding request, and what came back.
type request struct {
	to     netip.AddrPort // invalid: where the socket is connected to
	change byte           // flags of CHANGE-REQUEST, or 0
	// answerTo is the port that the server answers to, RESPONSE-PORT (RFC 5780 section 7.5), or 0.
	answerTo uint16

	message *stun.Message
	failed  error // of sending it, the last time
	answer  *stun.Message
	from    netip.AddrPort // of answer
}

func (r *request) build() error {
	setters := []stun.Setter{stun.TransactionID, stun.BindingRequest}
	if r.change != 0 {
		setters = append(setters, stun.RawAttribute{Type: stun.AttrChangeRequest, Value: []byte{0, 0, 0, r.change}})
	}
	if r.answerTo != 0 {
		value := binary.BigEndian.AppendUint16(nil, r.answerTo)
		setters = append(setters, stun.RawAttribute{Type: stun.AttrResponsePort, Value: append(value, 0, 0)})
	}
	var err error
	r.message, err = stun.Build(setters...)
	if err != nil {
		return fmt.Errorf("make STUN request: %w", err)
	}
	return nil
}

// mapped returns the endpoint that the server saw, or none without a good answer.
func (r *request) mapped() netip.AddrPort {
	if r.answer == nil || r.answer.Type != stun.BindingSuccess {
		return netip.AddrPort{}
	}
	var xor stun.XORMappedAddress
	if xor.GetFrom(r.answer) == nil {
		return endpoint(xor.IP, xor.Port)
	}
	return r.attribute(stun.AttrMappedAddress) // of servers of RFC 3489
}

// attribute returns the endpoint in an attribute of the answer, or none.
func (r *request) attribute(t stun.AttrType) netip.AddrPort {
	var a stun.MappedAddress
	if r.answer == nil || a.GetFromAs(r.answer, t) != nil {
		return netip.AddrPort{}
	}
	return endpoint(a.IP, a.Port)
}

// endpoint returns none for what no packet can come from.
func endpoint(ip net.IP, port int) netip.AddrPort {
	a, ok := netip.AddrFromSlice(ip)
	if !ok || a.IsUnspecified() || a.IsMulticast() || port == 0 {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(a.Unmap(), uint16(port))
}

// exchange sends the requests from a socket until each has an answer at the other socket,
// which is the same one except for hairpinning. A missing answer is no error. exchange closes
// at when ctx ends.
func exchange(ctx context.Context, rto time.Duration, from, at *net.UDPConn, requests ...*request) error {
	defer context.AfterFunc(ctx, func() { at.Close() })()
	for _, r := range requests {
		if err := r.build(); err != nil {
			return err
		}
	}
	wait := rto
	for i := range packets {
		for _, r := range requests {
			if r.answer == nil {
				r.failed = r.send(from)
			}
		}
		if err := receive(at, time.Now().Add(wait), requests); err != nil {
			return errors.Join(ctx.Err(), err)
		}
		if i < packets-2 {
			wait *= 2
		}
	}
	return nil
}

func (r *request) send(from *net.UDPConn) error {
	if !r.to.IsValid() {
		_, err := from.Write(r.message.Raw)
		return err
	}
	_, err := from.WriteToUDPAddrPort(r.message.Raw, r.to)
	return err
}

// receive reads until all requests have an answer or the time is over. It drops packets that
// belong to none of them.
func receive(at *net.UDPConn, until time.Time, requests []*request) error {
	if err := at.SetReadDeadline(until); err != nil {
		return err
	}
	var buf [2048]byte
	for open(requests) {
		n, from, err := at.ReadFromUDPAddrPort(buf[:])
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return nil
		case err != nil:
			return err
		}
		m := new(stun.Message)
		if stun.Decode(buf[:n], m) != nil || m.Type.Method != stun.MethodBinding {
			continue
		}
		for _, r := range requests {
			if r.answer == nil && m.TransactionID == r.message.TransactionID {
				r.answer, r.from = m, netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
			}
		}
	}
	return nil
}

// open reports whether a request has no answer.
func open(requests []*request) bool {
	return slices.ContainsFunc(requests, func(r *request) bool { return r.answer == nil })
}
