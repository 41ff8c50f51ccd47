package userrules

import (
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// "update @busy { ip saddr limit rate 5/second }", as the kernel of a machine reports it that
// aligns each u64 with an empty attribute before it: nla_need_padding_for_64bit, on MIPS and
// RISC-V for example.
//
// Fails when such a rule is not understood there.
func TestAlignedLimitsAreUnderstood(t *testing.T) {
	var e nfnl.Encoder
	statement := e.Nest(unix.NFTA_LIST_ELEM)
	e.Str(unix.NFTA_EXPR_NAME, "dynset")
	dynset := e.Nest(unix.NFTA_EXPR_DATA)
	e.Str(unix.NFTA_DYNSET_SET_NAME, "busy")
	limit := e.Nest(unix.NFTA_DYNSET_EXPR)
	e.Str(unix.NFTA_EXPR_NAME, "limit")
	data := e.Nest(unix.NFTA_EXPR_DATA)
	e.Bytes(unix.NFTA_LIMIT_PAD, nil)
	e.BE64(unix.NFTA_LIMIT_RATE, 5)
	e.EndNest(data)
	e.EndNest(limit)
	e.EndNest(dynset)
	e.EndNest(statement)

	all, odd := statements(unix.NFPROTO_IPV4, e.B)
	if odd != "" || len(all) != 1 {
		t.Fatalf("%d statements are read, and %s; want one", len(all), odd)
	}
	if _, ok := all[0].expr.(*expr.Dynset); !ok {
		t.Errorf("read as %T, want *expr.Dynset", all[0].expr)
	}
}
