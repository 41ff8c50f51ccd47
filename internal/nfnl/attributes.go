package nfnl

import (
	"encoding/binary"
	"strings"

	"golang.org/x/sys/unix"
)

// FamilyHeaderLen is the size of struct nfgenmsg, which precedes the attributes of a
// message.
const FamilyHeaderLen = 4

// EachAttribute calls f for each attribute in b. It stops at the first one that is malformed or for which
// f returns false, and returns false then. The type is without NLA_F_NESTED and
// NLA_F_NET_BYTEORDER. It does not allocate.
func EachAttribute(b []byte, f func(typ uint16, value []byte) bool) bool {
	const header, mask = 4, 0x3fff
	for len(b) > 0 {
		if len(b) < header {
			return false
		}
		n := int(binary.NativeEndian.Uint16(b))
		if n < header || n > len(b) || !f(binary.NativeEndian.Uint16(b[2:])&mask, b[header:n]) {
			return false
		}
		b = b[min(align4(n), len(b)):]
	}
	return true
}

// Attributes is EachAttribute for an f that takes everything.
func Attributes(b []byte, f func(typ uint16, value []byte)) bool {
	return EachAttribute(b, func(typ uint16, value []byte) bool {
		f(typ, value)
		return true
	})
}

func align4(n int) int { return (n + 3) &^ 3 }

// BE16 reads a value in network byte order. It returns false if b has another size.
func BE16(b []byte) (uint16, bool) {
	if len(b) != 2 {
		return 0, false
	}
	return binary.BigEndian.Uint16(b), true
}

// BE32 is BE16 for 32 bits.
func BE32(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// NE32 is BE32 in the byte order of the host, as rtnetlink has it.
func NE32(b []byte) (uint32, bool) {
	if len(b) != 4 {
		return 0, false
	}
	return binary.NativeEndian.Uint32(b), true
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
