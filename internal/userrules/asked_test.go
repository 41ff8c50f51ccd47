package userrules

import (
	"testing"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Sets may be long, and each reading reads them again. Sets of peer addresses, and sets of
// rules for another protocol, are not read.
//
// Fails when more or less of a set is read than the answers need.
func TestOnlySetsThatMatterAreRead(t *testing.T) {
	load := func(base expr.PayloadBase, offset, n uint32) expr.Any {
		return &expr.Payload{OperationType: expr.PayloadLoad, DestRegister: 1, Base: base, Offset: offset, Len: n}
	}
	const network, transport = expr.PayloadBaseNetworkHeader, expr.PayloadBaseTransportHeader
	meta := func(key expr.MetaKey) expr.Any { return &expr.Meta{Key: key, Register: 1} }
	l4proto := meta(expr.MetaKeyL4PROTO)
	is := func(b byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{b}} }
	for name, tt := range map[string]struct {
		family  byte
		loads   []expr.Any
		size    int
		unnamed bool
		want    purposes
	}{
		"sources":                        {loads: []expr.Any{load(network, 12, 4)}, size: 4},
		"sources of the rule's own":      {loads: []expr.Any{load(network, 12, 4)}, size: 4, unnamed: true, want: anyPurpose},
		"destinations":                   {loads: []expr.Any{load(network, 16, 4)}, size: 4, want: forDestinations | forVerdicts | forHelpers},
		"destinations of IPv6":           {family: unix.NFPROTO_INET, loads: []expr.Any{load(network, 24, 16)}, size: 16, want: forDestinations | forVerdicts | forHelpers},
		"sources of IPv6":                {family: unix.NFPROTO_INET, loads: []expr.Any{meta(expr.MetaKeyNFPROTO), is(unix.NFPROTO_IPV6), load(network, 8, 16)}, size: 16},
		"ports":                          {loads: []expr.Any{load(transport, 2, 2)}, size: 2, want: forDestinations | forVerdicts | forHelpers},
		"source ports":                   {loads: []expr.Any{load(transport, 0, 2)}, size: 2},
		"links that they come by":        {loads: []expr.Any{meta(expr.MetaKeyIIFNAME)}, size: 16, want: forDestinations | forVerdicts | forHelpers},
		"links that they leave by":       {loads: []expr.Any{meta(expr.MetaKeyOIFNAME)}, size: 16, want: forSources | forVerdicts},
		"marks":                          {loads: []expr.Any{meta(expr.MetaKeyMARK)}, size: 4},
		"states":                         {loads: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}, size: 4, want: forSources | forVerdicts},
		"ports of TCP":                   {loads: []expr.Any{l4proto, is(unix.IPPROTO_TCP), load(transport, 2, 2)}, size: 2, unnamed: true},
		"ports of UDP":                   {loads: []expr.Any{l4proto, is(unix.IPPROTO_UDP), load(transport, 2, 2)}, size: 2, want: forDestinations | forVerdicts | forHelpers},
		"ports behind what nobody knows": {loads: []expr.Any{l4proto, nil, is(unix.IPPROTO_TCP), load(transport, 2, 2)}, size: 2, want: forDestinations | forVerdicts | forHelpers},
		"destinations of a prefix":       {loads: []expr.Any{load(network, 16, 2)}, size: 2, want: forDestinations | forVerdicts | forHelpers},
		"destinations that were lost":    {loads: []expr.Any{load(network, 16, 4), meta(expr.MetaKeyMARK)}, size: 4},
	} {
		t.Run(name, func(t *testing.T) {
			if tt.family == 0 {
				tt.family = unix.NFPROTO_IPV4
			}
			var r rule
			for _, e := range append(tt.loads, &expr.Lookup{SourceRegister: 1, SetName: "s"}) {
				r.statements = append(r.statements, statement{expr: e})
			}
			var got purposes
			for _, l := range asked(&r, tt.family, func(string) *set { return &set{size: tt.size, named: !tt.unnamed} }) {
				got |= l.asks
			}
			if got != tt.want {
				t.Errorf("asked for %b, want %b", got, tt.want)
			}
		})
	}
}
