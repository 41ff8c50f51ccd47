package nfnl

import "encoding/binary"

// ChildLabel is the conntrack label (struct nf_conn_labels, CTA_LABELS) of the flows that
// our map of permissions admits: bit 126, in nft's layout, a 128-bit number in host byte
// order. Other bits belong to others.
var ChildLabel = childLabel()

func childLabel() (l [16]byte) {
	const bit = 126
	at := bit / 8
	if binary.NativeEndian.Uint16([]byte{1, 0}) != 1 {
		at = len(l) - 1 - at
	}
	l[at] = 1 << (bit % 8)
	return l
}

// HasChildLabel reports whether the labels of a flow include ChildLabel.
func HasChildLabel(labels []byte) bool {
	if len(labels) != len(ChildLabel) {
		return false
	}
	for i, b := range ChildLabel {
		if labels[i]&b != b {
			return false
		}
	}
	return true
}
