package rules

import (
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// marksSize limits the connmarks of permissions. It does not depend on the size of the map
// of permissions, so the map of marks never has to be recreated.
const marksSize = 1 << 20

// makeMarks makes the map of connmarks if want needs one, in a separate transaction: nft
// lists the map's values in the byte order given in the map's user data, which the library
// does not write. It reports whether it changed the table. The writer must be locked.
func (t *Tables) makeMarks(have *state, want *layout) (changed bool, err error) {
	if want == nil {
		return false, nil
	}
	i := slices.IndexFunc(want.sets, func(s *set) bool { return s.Name == elements.MarksMap })
	if i < 0 {
		return false, nil
	}
	marks := want.sets[i].Set
	if have.table != nil && have.table.Flags == t.flags {
		for _, s := range have.sets {
			if s.Name == elements.MarksMap && sameSet(s)(marks) {
				return false, nil
			}
		}
	}
	if have.table != nil && (have.table.Flags != t.flags || have.has(elements.MarksMap)) {
		t.w.DelTable(t.owned(want.table.Family))
		if err := t.flush("make anew"); err != nil {
			return false, err
		}
	}
	return true, t.encodeMarks(marks)
}

func (s *state) has(set string) bool {
	return slices.ContainsFunc(s.sets, func(s *nftables.Set) bool { return s.Name == set })
}

func (t *Tables) encodeMarks(marks *nftables.Set) error {
	const hostByteOrder = 1
	var e nfnl.Encoder
	seq := t.w.batch.NextSeq(5)
	message := func(typ uint16) {
		seq++
		e.Message(unix.NFNL_SUBSYS_NFTABLES, typ, unix.NLM_F_REQUEST|unix.NLM_F_CREATE, seq, unix.AF_INET)
	}
	e.BeginTransaction(unix.NFNL_SUBSYS_NFTABLES, seq)
	message(unix.NFT_MSG_NEWTABLE)
	e.Str(unix.NFTA_TABLE_NAME, t.name)
	e.BE32(unix.NFTA_TABLE_FLAGS, uint32(t.flags))
	e.End()
	message(unix.NFT_MSG_NEWCHAIN)
	e.Str(unix.NFTA_CHAIN_TABLE, t.name)
	e.Str(unix.NFTA_CHAIN_NAME, MarkerChain)
	e.End()
	message(unix.NFT_MSG_NEWSET)
	e.Str(unix.NFTA_SET_TABLE, t.name)
	e.Str(unix.NFTA_SET_NAME, marks.Name)
	e.BE32(unix.NFTA_SET_FLAGS, unix.NFT_SET_MAP|unix.NFT_SET_TIMEOUT|unix.NFT_SET_EVAL)
	e.BE32(unix.NFTA_SET_KEY_TYPE, marks.KeyType.GetNFTMagic())
	e.BE32(unix.NFTA_SET_KEY_LEN, marks.KeyType.Bytes)
	e.BE32(unix.NFTA_SET_DATA_TYPE, marks.DataType.GetNFTMagic())
	e.BE32(unix.NFTA_SET_DATA_LEN, marks.DataType.Bytes)
	e.BE32(unix.NFTA_SET_ID, 1)
	e.BE64(unix.NFTA_SET_TIMEOUT, uint64(marks.Timeout.Milliseconds()))
	desc := e.Nest(unix.NFTA_SET_DESC)
	e.BE32(unix.NFTA_SET_DESC_SIZE, marks.Size)
	e.EndNest(desc)
	data := userdata.AppendUint32(nil, userdata.NFTNL_UDATA_SET_DATABYTEORDER, hostByteOrder)
	e.Attr(unix.NFTA_SET_USERDATA, len(data))
	e.B = append(e.B, data...)
	e.Pad()
	e.End()
	e.EndTransaction(unix.NFNL_SUBSYS_NFTABLES, seq+1)
	var refused error
	err := t.w.batch.Exchange(&e, func(_ uint32, err error) { refused = errors.Join(refused, err) }, nil)
	if err = errors.Join(err, refused); err != nil {
		return fmt.Errorf("make map %s: %w", marks.Name, nfnl.Permitted(err))
	}
	return nil
}
