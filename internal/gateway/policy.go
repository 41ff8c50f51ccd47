package gateway

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// RoutesByMark reports whether a rule of policy routing asks for a mark (ip rule add
// fwmark). Then nobody can tell the way back to a source before the mark is set, and
// the mark may be one that only the answers get.
func RoutesByMark(netns int) (is bool, err error) {
	c, err := dial(unix.NETLINK_ROUTE, netns)
	if err != nil {
		return false, err
	}
	defer func() { _ = c.close() }()
	for range attempts {
		is = false
		err = c.exchange(newRequest(unix.RTM_GETRULE, unix.NLM_F_DUMP, fibRuleHeaderLen), func(b []byte) error {
			return attributes(b, fibRuleHeaderLen, func(ad *netlink.AttributeDecoder) {
				if ad.Type() == unix.FRA_FWMARK {
					// 0 asks for packets without a mark, and is not there as a rule.
					is = is || binary.NativeEndian.Uint32(ad.Bytes()) != 0
				}
			})
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
