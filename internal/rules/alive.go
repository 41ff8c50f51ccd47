package rules

import (
	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// silent matches while the daemon has given no sign of life for long, and packets other than
// UDP. Then the kernel learns nothing: nobody would revoke it, or end what it lets in.
func (l *layout) silent() exprs {
	alive := l.protocols(elements.AliveSet)
	alive.Timeout, alive.first = elements.AliveTimeout, []nftables.SetElement{{Key: []byte{unix.IPPROTO_UDP}}}
	return metaL4proto.notIn(alive)
}
