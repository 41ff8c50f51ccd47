package userrules

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// spec returns the specification of a rule that keeps packets from conntrack, as "iptables -D CHAIN" takes
// it, in words. iptables deletes the first rule whose bytes are those that it would make of the words, so
// there is none unless all bytes are understood.
func (f *legacyFamily) spec(e legacyEntry) []string {
	if !e.target.isNoTrack() {
		return nil
	}
	words, ok := f.conditionWords(e.conditions)
	for _, m := range e.matches {
		more, known := m.words()
		words, ok = append(words, more...), ok && known
	}
	if !ok {
		return nil
	}
	return append(words, "-j", "CT", "--notrack")
}

// conditionWords returns the words for a struct ipt_ip or ip6t_ip6, and whether they say all of it.
func (f *legacyFamily) conditionWords(b []byte) (words []string, ok bool) {
	left := slices.Clone(b) // what no word says yet
	take := func(at, n int) []byte { clear(left[at : at+n]); return b[at : at+n] }
	inverted := func(bit byte) bool { left[f.inverted] &^= bit; return b[f.inverted]&bit != 0 }
	add := func(not bool, option, value string) { words = appendOption(words, not, option, value) }
	for n, option := range []string{"-s", "-d"} {
		prefix, any := maskedPrefix(take(n*f.address, f.address), take((2+n)*f.address, f.address))
		switch not := inverted([]byte{invertSource, invertDestination}[n]); {
		case !prefix.IsValid() || any && not:
			return nil, false
		case !any:
			add(not, option, prefix.String())
		}
	}
	for n, option := range []string{"-i", "-o"} {
		at := 4*f.address + n*unix.IFNAMSIZ
		name, known := linkPattern(take(at, unix.IFNAMSIZ), take(at+2*unix.IFNAMSIZ, unix.IFNAMSIZ))
		switch not := inverted([]byte{invertIn, invertOut}[n]); {
		case !known || name == "" && not:
			return nil, false
		case name != "":
			add(not, option, name)
		}
	}
	protocol := binary.NativeEndian.Uint16(take(f.protocol, 2))
	if f == legacy6 && protocol != 0 {
		left[f.flags] ^= legacyHasProto6 // iptables sets it
	}
	switch not := inverted(invertProtocol); {
	case protocol == 0 && not:
		return nil, false
	case protocol == unix.IPPROTO_UDP:
		add(not, "-p", "udp")
	case protocol != 0:
		add(not, "-p", strconv.Itoa(int(protocol)))
	}
	return words, allZero(left)
}

// maskedPrefix returns the prefix of an address and a mask, and whether it holds all addresses. It is not valid
// if iptables would not make these bytes of it.
func maskedPrefix(address, mask []byte) (p netip.Prefix, any bool) {
	ones, bits := net.IPMask(mask).Size()
	a, ok := netip.AddrFromSlice(address)
	if p = netip.PrefixFrom(a, ones); !ok || bits == 0 || p.Masked() != p {
		return netip.Prefix{}, false
	}
	return p, ones == 0
}

// linkPattern returns the name of a link, or its beginning and "+", and nothing if any link is meant. It returns
// false for what iptables does not make.
func linkPattern(name, mask []byte) (pattern string, ok bool) {
	n := len(bytes.TrimRight(mask, "\x00"))
	text := unix.ByteSliceToString(name)
	switch {
	case isOdd(mask[:n]) || !allZero(name[len(text):]):
		return "", false
	case strings.HasSuffix(text, "+"):
		return text, n == len(text)-1 && n > 0
	case text != "":
		return text, n == len(text)+1
	}
	return "", n == 0
}

// words returns the words for a match, and whether they say all of it.
func (p xtPart) words() (words []string, ok bool) {
	add := func(not bool, option, value string) { words = appendOption(words, not, option, value) }
	switch {
	case p.name == "udp" && p.revision == 0 && len(p.info) >= 9: // struct xt_udp
		words = []string{"-m", "udp"}
		for n, option := range []string{"--sport", "--dport"} {
			first, last := binary.NativeEndian.Uint16(p.info[4*n:]), binary.NativeEndian.Uint16(p.info[4*n+2:])
			not := p.info[8]&byte([]xt.UdpInvFlagset{xt.UdpInvSrcPorts, xt.UdpInvDestPorts}[n]) != 0
			switch all := first == 0 && last == 0xffff; {
			case all && not || first > last:
				return nil, false
			case !all:
				add(not, option, portWords(first, last))
			}
		}
		return words, p.info[8]&^byte(xt.UdpInvSrcPorts|xt.UdpInvDestPorts) == 0 && allZero(p.info[9:])
	case p.name == "multiport" && p.revision == 1 && len(p.info) >= multiportSize && p.info[0] <= multiportEither:
		spans, known := multiportSpans(p.revision, p.info)
		var ports []string
		for _, s := range spans {
			ports = append(ports, portWords(binary.BigEndian.Uint16(s.low), binary.BigEndian.Uint16(s.high)))
		}
		words = []string{"-m", "multiport"}
		add(p.info[multiportInvert] != 0, []string{"--sports", "--dports", "--ports"}[p.info[0]], strings.Join(ports, ","))
		unused := multiportPorts + 2*int(p.info[1])
		return words, known && allZero(p.info[unused:multiportRanges]) && allZero(p.info[multiportRanges+int(p.info[1]):multiportInvert])
	case p.name == "comment" && p.revision == 0:
		text := unix.ByteSliceToString(p.info)
		printable := !strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar })
		return []string{"-m", "comment", "--comment", text}, text != "" && printable && allZero(p.info[len(text):])
	}
	return nil, false
}

func appendOption(words []string, not bool, option, value string) []string {
	if not {
		words = append(words, "!")
	}
	return append(words, option, value)
}

func portWords(first, last uint16) string {
	if first == last {
		return strconv.Itoa(int(first))
	}
	return strconv.Itoa(int(first)) + ":" + strconv.Itoa(int(last))
}

// isNoTrack reports whether a target is what iptables makes of "-j CT --notrack".
func (p xtPart) isNoTrack() bool {
	return p.name == "CT" && p.revision == 2 && len(p.info) > 2 && binary.NativeEndian.Uint16(p.info) == ctNoTrack && allZero(p.info[2:])
}

func allZero(b []byte) bool { return !slices.ContainsFunc(b, func(b byte) bool { return b != 0 }) }
