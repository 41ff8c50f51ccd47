package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// Packet is a packet to be sent.
type Packet struct {
	From    *Socket
	To      netip.AddrPort
	Payload string
}

func (p Packet) send() error { return p.From.Send(p.To, p.Payload) }

// ErrArrived is the error of Lost when the packet gets through.
var ErrArrived = errors.New("arrived")

// Lost shows that a packet does not reach the receiver. After the packet it sends a
// fence: a packet with another payload that is known to get through, such as an
// answer that any NAT lets in. If the fence arrives and the packet has not, the
// packet is lost. Waiting instead would be slow, and prove nothing on a busy
// machine. The error says which of the two failed; an error about the fence says
// nothing about the packet. Other packets that arrive before the fence are skipped.
//
// This is sound because the fence cannot overtake the packet if both take the same
// links. A veth device does not queue packets: it puts each one in the receive
// backlog of the sending CPU. That backlog is a FIFO which only this CPU empties,
// in softirq, and each packet's whole way through the gateway to the next hop
// happens there. Veth has one queue, and no GRO or RPS unless enabled; the link
// addresses are permanent, so no packet waits for ARP; the receiving socket is a
// FIFO too. So packets of one CPU stay in order, and Lost sends both from one
// thread bound to one CPU. It refuses senders in different namespaces, whose
// packets take different links. Rules that delay packets (queues to user space,
// traffic shaping) would break this argument.
func Lost(receiver *Socket, packet, fence Packet) error {
	if packet.From.ns != fence.From.ns || packet.Payload == fence.Payload {
		return errors.New("lose packet: the fence must be from the same namespace and have a payload of its own")
	}
	if err := onOneCPU(packet.send, fence.send); err != nil {
		return fmt.Errorf("send packet and fence: %w", err)
	}
	for deadline := time.Now().Add(receiveTimeout); ; {
		got, from, err := receiver.Recv(time.Until(deadline))
		switch {
		case err != nil:
			return fmt.Errorf("receive fence %q: %w", fence.Payload, err)
		case got == packet.Payload:
			return fmt.Errorf("lose packet: %q %w from %s", got, ErrArrived, from)
		case got == fence.Payload:
			return nil
		}
	}
}

// onOneCPU runs the functions on one thread bound to one CPU.
func onOneCPU(fns ...func() error) (err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	var allowed, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &allowed); err != nil {
		return fmt.Errorf("get CPU affinity: %w", err)
	}
	for cpu := 0; one.Count() == 0; cpu++ {
		if allowed.IsSet(cpu) {
			one.Set(cpu)
		}
	}
	if err := unix.SchedSetaffinity(0, &one); err != nil {
		return fmt.Errorf("set CPU affinity: %w", err)
	}
	defer func() { err = errors.Join(err, unix.SchedSetaffinity(0, &allowed)) }()
	for _, fn := range fns {
		if err := fn(); err != nil {
			return err
		}
	}
	return nil
}
