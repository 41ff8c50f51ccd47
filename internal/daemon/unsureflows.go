package daemon

import (
	"slices"

	"github.com/conenatd/conenatd/internal/evidence"
)

// unsureFlows counts flows of inside hosts that earned nothing because they came by another link than the
// way back to their hosts, on a gateway whose routing rules hide that way
// (gateway.WaysBack).
type unsureFlows struct {
	hidden bool     // there is such a rule
	inside []string // the links for which the user vouches
	flows  evidence.Count
	before uint64 // flows when one of these changed
}

// observe takes in whether a routing rule hides ways back, and the links that the user names inside.
func (d *unsureFlows) observe(hidden bool, inside []string) {
	if hidden != d.hidden || !slices.Equal(inside, d.inside) {
		d.hidden, d.inside, d.before = hidden, slices.Clone(inside), d.flows.Total
	}
}

func (d *unsureFlows) warnings() (out warnings) {
	if n := d.flows.Total - d.before; d.hidden && n > 0 {
		out.add(warnWayBackUnknown, "", "flows of inside hosts earned no permission, %d so far: they came by another link than the way back to their hosts "+
			"as the kernel looks it up, and routing rules of yours hide that way, for they select by tos, dscp, iif, ports, a mark or a tunnel (ip rule): "+
			"if nobody can fake the addresses of hosts on that link, name it in inside", n)
	}
	return out
}
