package nfnl

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// Generation reads the number of the last transaction of nftables.
func Generation(c *Conn) (id uint32, err error) {
	var e Encoder
	e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETGEN, unix.NLM_F_REQUEST, c.NextSeq(1), unix.AF_UNSPEC)
	e.End()
	answered := false
	err = c.Ask(&e, func(typ uint16, body []byte) {
		if n, ok := GenerationOf(typ, body); ok {
			id, answered = n, true
		}
	})
	if err == nil && !answered {
		err = errors.New("no answer")
	}
	return id, err
}

// GenerationOf reads the number from a message of the kernel that contains one.
func GenerationOf(typ uint16, body []byte) (id uint32, ok bool) {
	if typ != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN || len(body) < FamilyHeaderLen {
		return 0, false
	}
	Attributes(body[FamilyHeaderLen:], func(typ uint16, b []byte) {
		if typ == unix.NFTA_GEN_ID && len(b) == 4 {
			id, ok = binary.BigEndian.Uint32(b), true
		}
	})
	return id, ok
}
