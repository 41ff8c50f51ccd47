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
	return t.counted(nftables.TableFamilyIPv4, learnedCounter)
}

// counted returns the packets of one counter in the table of a family. It fails if the table
// does not have it.
func (t *Tables) counted(family nftables.TableFamily, name string) (packets uint64, err error) {
	o, err := t.c.GetObject(&nftables.NamedObj{Table: t.owned(family), Name: name, Type: nftables.ObjTypeCounter})
	if err != nil {
		return 0, fmt.Errorf("read counter %s: %w", name, nfnl.Permitted(err))
	}
	if o, ok := o.(*nftables.NamedObj); ok {
		if c, ok := o.Obj.(*expr.Counter); ok {
			return c.Packets, nil
		}
	}
	return 0, fmt.Errorf("read counter %s: the kernel told something else", name)
}
