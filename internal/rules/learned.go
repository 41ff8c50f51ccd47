package rules

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Learned returns how many packets taught the kernel a permission. It is cheaper than
// Counters, and fails if there is no map.
func (t *Tables) Learned() (packets uint64, err error) {
	o, err := t.c.GetObject(&nftables.NamedObj{
		Table: t.owned(nftables.TableFamilyIPv4), Name: learnedCounter, Type: nftables.ObjTypeCounter,
	})
	if err != nil {
		return 0, fmt.Errorf("read counter %s: %w", learnedCounter, nfnl.Permitted(err))
	}
	if o, ok := o.(*nftables.NamedObj); ok {
		if c, ok := o.Obj.(*expr.Counter); ok {
			return c.Packets, nil
		}
	}
	return 0, fmt.Errorf("read counter %s: the kernel told something else", learnedCounter)
}
