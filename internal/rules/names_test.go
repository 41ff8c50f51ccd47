package rules

import (
	"encoding/binary"
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/nfnl/nfnltest"
)

// chainOf is the kernel's message about a chain.
func chainOf(table, name string) []byte {
	var e nfnl.Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_NEWCHAIN, 0, 0, unix.NFPROTO_INET)
	e.Str(unix.NFTA_CHAIN_TABLE, table)
	e.Str(unix.NFTA_CHAIN_NAME, name)
	e.End()
	return e.B[unix.NLMSG_HDRLEN:]
}

// Fails when an interrupted dump, which lacks a table, is taken for a complete one.
func TestNamesAreReadUntilTheDumpIsWhole(t *testing.T) {
	for name, tt := range map[string]struct {
		interruptions int
		want          []string
		err           error
	}{
		"at once":    {0, []string{"cone", "old"}, nil},
		"in the end": {2, []string{"cone", "old"}, nil},
		"never":      {1000, nil, nfnl.ErrInterrupted},
	} {
		t.Run(name, func(t *testing.T) {
			c, k := nfnltest.New(t)
			dumps := 0
			k.Answer = func(sent []nfnltest.Request) (out [][]byte) {
				seq := sent[0].Seq
				dumps++
				flags := uint16(unix.NLM_F_MULTI)
				chains := [][]byte{chainOf("theirs", "made_by_somebody"), chainOf("cone", MarkerChain)}
				if dumps <= tt.interruptions {
					flags |= unix.NLM_F_DUMP_INTR
				} else {
					chains = append(chains, chainOf("old", MarkerChain))
				}
				for _, b := range chains {
					out = append(out, nfnltest.Message(unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWCHAIN, seq, b))
				}
				out = append(out, nfnltest.Message(unix.NLMSG_DONE, seq, make([]byte, 4)))
				for _, b := range out {
					binary.NativeEndian.PutUint16(b[6:], flags)
				}
				return out
			}
			got, err := names(c)
			if !slices.Equal(got, tt.want) || !errors.Is(err, tt.err) {
				t.Errorf("%q, %v, want %q, %v", got, err, tt.want, tt.err)
			}
		})
	}
}
