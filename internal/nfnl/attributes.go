package nfnl

import (
	"encoding/binary"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"
)

// FamilyHeaderLen is the size of struct nfgenmsg, which precedes the attributes of a
// message.
const FamilyHeaderLen = 4

// Attributes calls f for each attribute in b. It stops at the first malformed one.
func Attributes(b []byte, f func(typ uint16, b []byte)) {
	const header, mask = 4, 0x3fff // without NLA_F_NESTED and NLA_F_NET_BYTEORDER
	for len(b) >= header {
		n := int(binary.NativeEndian.Uint16(b))
		if n < header || n > len(b) {
			return
		}
		f(binary.NativeEndian.Uint16(b[2:])&mask, b[header:n])
		b = b[min((n+3)&^3, len(b)):]
	}
}

// Text reads a string that ends with a zero byte.
func Text(b []byte) string { return strings.TrimRight(string(b), "\x00") }

// Data returns the value in an nftables data attribute, such as a key.
func Data(b []byte) (value []byte) {
	Attributes(b, func(typ uint16, b []byte) {
		if typ == unix.NFTA_DATA_VALUE {
			value = b
		}
	})
	return value
}

// LinkKey returns the name of a link in the form that nftables rules compare.
func LinkKey(name string) []byte {
	key := make([]byte, unix.IFNAMSIZ)
	copy(key[:unix.IFNAMSIZ-1], name)
	return key
}

// LastAddr returns the last address of a prefix, which is the end of its interval.
func LastAddr(p netip.Prefix) netip.Addr {
	b := p.Masked().Addr().AsSlice()
	for bit := p.Bits(); bit < 8*len(b); bit++ {
		b[bit/8] |= 0x80 >> (bit % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// FamilyName returns nft's name of a table family, or "" if the family is not for IPv4,
// IPv6 or both.
func FamilyName(family byte) string {
	switch family {
	case unix.NFPROTO_IPV4:
		return "ip"
	case unix.NFPROTO_IPV6:
		return "ip6"
	case unix.NFPROTO_INET:
		return "inet"
	}
	return ""
}
