// Package portpool finds outside ports for hosts whose own port is taken: ports of the user's
// port_pool that the kernel does not give to the gateway's own sockets.
package portpool

import (
	"fmt"
	"os"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
)

const (
	// Wanted is how many ports a pool should have: if the default pool has fewer
	// left, other ports are used.
	Wanted = 1024
	// leastPool is the least size of a pool if the user chose none.
	leastPool = 64
	// leastLocal is how many ports the gateway's own sockets must keep.
	leastLocal = 1024
	rangeKey   = "net.ipv4.ip_local_port_range"
	reserveKey = "net.ipv4.ip_local_reserved_ports"
)

// unprivileged are the ports that programs without privileges may use.
var unprivileged = cone.PortRange{First: 1024, Last: 65535}

// Local are the ports that the kernel gives to the gateway's own sockets: those
// of ip_local_port_range that are not in ip_local_reserved_ports.
type Local struct {
	given    cone.PortRange
	reserved string // as the kernel lists them
	is       [1 << 16]bool
}

// ReadLocal reads them.
func ReadLocal() (*Local, error) {
	given, err := os.ReadFile(procPath(rangeKey))
	if err != nil {
		return nil, fmt.Errorf("read the range of local ports: %w", err)
	}
	reserved, err := os.ReadFile(procPath(reserveKey))
	if err != nil {
		return nil, fmt.Errorf("read the reserved ports: %w", err)
	}
	return newLocal(string(given), string(reserved))
}

// procPath returns the file of a sysctl.
func procPath(key string) string { return "/proc/sys/" + strings.ReplaceAll(key, ".", "/") }

// newLocal reads both settings as the kernel writes them: "32768 60999" and
// "8080,9000-9999".
func newLocal(given, reserved string) (*Local, error) {
	l := &Local{reserved: strings.TrimSpace(reserved)}
	if _, err := fmt.Sscan(given, &l.given.First, &l.given.Last); err != nil {
		return nil, fmt.Errorf("read %s %q: %w", rangeKey, given, err)
	}
	l.set(l.given, true)
	for r := range strings.SplitSeq(l.reserved, ",") {
		if r == "" {
			continue
		}
		ports, ok := cone.ParsePortRange(r)
		if !ok {
			return nil, fmt.Errorf("read %s: %q is no range of ports", reserveKey, r)
		}
		l.set(ports, false)
	}
	return l, nil
}

func (l *Local) set(r cone.PortRange, local bool) {
	for p := int(r.First); p <= int(r.Last); p++ {
		l.is[p] = local
	}
}

// clear returns the longest part of r that has no local port, and how many ports it
// has. Of two that are equally long it returns the upper one.
func (l *Local) clear(r cone.PortRange) (part cone.PortRange, n int) {
	first := int(r.First)
	for p := int(r.First); p <= int(r.Last); p++ {
		switch {
		case l.is[p]:
			first = p + 1
		case p-first+1 >= n:
			part, n = cone.PortRange{First: uint16(first), Last: uint16(p)}, p-first+1
		}
	}
	return part, n
}

// Choose returns ports of the wanted pool that are not local ones: the longest such part
// of each range. If too few are left of the default pool, which nobody chose, it returns
// other ports. ok is false if too few are left for a pool.
func (l *Local) Choose(wanted config.PortPool) (pool cone.PortRanges, ok bool) {
	for _, r := range wanted.Ranges() {
		if part, n := l.clear(r); n > 0 {
			pool = append(pool, part)
		}
	}
	n := pool.Len()
	if n >= Wanted || wanted != config.Default().PortPool {
		return pool, n > 0 || wanted == config.NoPool
	}
	if other, m := l.clear(unprivileged); m > n {
		pool, n = cone.PortRanges{other}, m
	}
	if size := wanted.Ranges().Len(); n > size {
		pool[0].First = uint16(int(pool[0].Last) - size + 1)
	}
	return pool, n >= leastPool
}

// Reserve returns the command that reserves a pool, so that it has no local ports. It
// returns "" if few local ports would be left: a program that needs one then gets EAGAIN or
// EADDRINUSE.
func (l *Local) Reserve(pool cone.PortRanges) string {
	left := *l
	for _, r := range pool {
		left.set(r, false)
	}
	if left.count() < leastLocal {
		return ""
	}
	all := pool.Text()
	if l.reserved != "" {
		all = l.reserved + "," + all
	}
	return "sysctl -w " + reserveKey + "=" + all
}

// Overlap says that the gateway's own connections use ports of a pool, and how to stop that.
func (l *Local) Overlap(pool cone.PortRanges) string {
	text := fmt.Sprintf("port_pool %v overlaps the ports of the gateway's own connections (%s = %v)", pool.Text(), rangeKey, l.given.Text())
	if reserve := l.Reserve(pool); reserve != "" {
		return text + ": keep them apart with '" + reserve + "'"
	}
	if other, n := l.clear(unprivileged); n > 0 {
		return text + fmt.Sprintf(", which need them: choose ports of %v", other.Text())
	}
	return text + ", which need them: choose a shorter range for these"
}

// count returns how many local ports there are.
func (l *Local) count() (n int) {
	for _, is := range l.is {
		if is {
			n++
		}
	}
	return n
}

// An Error says that no port is left for a pool.
type Error struct {
	Text string
	Fix  string // shell command that makes room
}

func (e *Error) Error() string { return e.Text }
