package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// RoutesByMark reports whether a rule of policy routing asks for a mark (ip rule add
// fwmark), in other bits than ours. Then nobody can tell the way back to a source before the
// mark is set, and the mark may be one that only the answers get.
func RoutesByMark(netns int, ours uint32) (is bool, err error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.close() }()
	for range attempts {
		is = false
		err = c.exchange(newRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP, fibRuleHeaderLen), func(b []byte) error {
			mark, mask := uint32(0), uint32(math.MaxUint32)
			err := attributes(b, fibRuleHeaderLen, func(ad *netlink.AttributeDecoder) {
				switch ad.Type() {
				case unix.FRA_FWMARK:
					mark = ad.Uint32()
				case unix.FRA_FWMASK:
					mask = ad.Uint32()
				}
			})
			// A mark of 0 asks for packets without one, and is not there as a rule. Any rule
			// may have the mask alone.
			isOurs := mask&^ours == 0 && binary.NativeEndian.Uint32(b[8:])&unix.FIB_RULE_INVERT == 0
			is = is || mark != 0 && !isOurs
			return err
		})
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	switch {
	case errors.Is(err, unix.EOPNOTSUPP): // a kernel without policy routing
		return false, nil
	case err != nil:
		return false, fmt.Errorf("read rules of policy routing: %w", err)
	}
	return is, nil
}

const fibRuleHeaderLen = 12 // struct fib_rule_hdr
