package lab

import (
	"errors"
	"fmt"
	"os"
	"time"
)

// Arrives shows that a packet reaches the receiver. The way may open a moment after
// the permission was earned, so it resends the packet until it arrives, as UDP
// clients do, for five seconds at most. It skips other packets that arrive
// meanwhile; copies may arrive later.
func Arrives(receiver *Socket, packet Packet) error {
	const again, most = 20 * time.Millisecond, 250
	for range most {
		if err := packet.From.Send(packet.To, packet.Payload); err != nil {
			return err
		}
		for {
			got, _, err := receiver.Recv(again)
			if err == nil && got == packet.Payload {
				return nil
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("%q from %v to %v did not arrive at %v", packet.Payload, packet.From.Addr(), packet.To, receiver.Addr())
}
