package rules

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

const (
	// After source NAT, and before conntrack's helpers, which may drop the packet. They see it at
	// NF_IP_PRI_CONNTRACK_HELPER, 300, or on newer kernels when it is confirmed, after all chains.
	helpedPriority = 299
	// helpedTimeout is shorter than the model remembers a pair, which the next packet of a flow
	// adds again. helpedSize limits how many pairs there are.
	helpedTimeout = 30 * time.Minute
	helpedSize    = 1 << 16

	helpedSet      = "helped"       // and the IP version
	helpedHostsSet = "helped_hosts" // and the IP version, for flows of TCP, whose ports are no UDP flow's
	helpedCounter  = "helped_pairs"
)

// Servers' ports for which the kernel's own helpers that expect UDP flows are, where helpers are
// automatic: TFTP, RAS, SIP and H.323.
var (
	udpHelperPorts = []uint16{69, 1719, 5060}
	tcpHelperPorts = []uint16{1720, 5060}
)

// helped remembers between which hosts conntrack helpers of the user's work, and where the answers
// go, from the first packet on. Such a helper drops a packet if an expectation of ours is where it
// wants its own, and then nothing else shows the flow: it is not confirmed.
//
// A rule of nft cannot see a flow's own helper ("ct helper" is that of its master), but the
// status that all rules set which give one.
func (l *layout) helped(d Desired) {
	l.counters = append(l.counters, helpedCounter)
	c, pair := l.filter("helped", nftables.ChainHookPostrouting, helpedPriority), l.regular("helped_pair")
	l.rule(c, "a rule gave the flow a helper", hasStatus(ctHelped), goTo(pair))
	if d.AutoHelpers {
		for _, of := range []struct {
			name  string
			is    exprs
			ports []uint16
		}{{"udp", isUDP, udpHelperPorts}, {"tcp", isTCP, tcpHelperPorts}} {
			ports := l.set("helper_ports_"+of.name, nftables.TypeInetService)
			ports.setPorts(of.ports)
			l.rule(c, "the kernel gives it one (nf_conntrack_helper)", of.is, ctReplyProtoSrc.in(ports), goTo(pair))
		}
	}
	served := familiesOf(d.Subnets)
	if d.Self {
		served = ipFamilies
	}
	for _, f := range served {
		flows := l.set(helpedSet+f.name, f.addr, f.addr, f.addr, nftables.TypeInetService)
		pairs := l.set(helpedHostsSet+f.name, f.addr, f.addr)
		for _, set := range []*set{flows, pairs} {
			set.HasTimeout, set.Dynamic, set.free = true, true, true
			set.Timeout, set.Size = helpedTimeout, helpedSize
		}
		var hosts []exprs
		if d.Self { // its address may be any
			hosts = []exprs{nil}
		} else {
			inside := l.inside(f, d.Subnets)
			hosts = []exprs{f.opener.in(inside), f.answerer.in(inside)}
		}
		flow, both := concat(f.opener, f.answerer, f.answered, ctReplyProtoDst), concat(f.opener, f.answerer)
		for _, host := range hosts {
			const why = "no expectation may be in its way"
			l.rule(pair, why, f.is, isUDP, host, flow.notIn(flows), addTo(flows, elem{key: flow}), counter(helpedCounter))
			l.rule(pair, why, f.is, isTCP, host, both.notIn(pairs), addTo(pairs, elem{key: both}), counter(helpedCounter))
		}
	}
}

// HelpedPairs returns how many pairs of hosts were added to those that Helped lists. It starts
// again with 0 when the tables are made anew, or no longer have these pairs.
func (t *Tables) HelpedPairs() (uint64, error) {
	return t.counted(nftables.TableFamilyINet, helpedCounter)
}

// Helped calls f for every pair of hosts between which a conntrack helper of the user's works: the
// source of a flow, the host that answers it, and where the answers go, zero for a flow of TCP. It uses
// its own connection.
func (t *Tables) Helped(f func(opener, answerer netip.Addr, ext netip.AddrPort)) error {
	var errs []error
	for _, family := range ipFamilies {
		for _, set := range []string{helpedSet, helpedHostsSet} {
			errs = append(errs, elements.List(t.netns, unix.NFPROTO_INET, t.name, set+family.name, func(b []byte) {
				key, n := elements.Key(b), family.size
				if len(key) < 2*n {
					return
				}
				opener, _ := netip.AddrFromSlice(key[:n])
				answerer, _ := netip.AddrFromSlice(key[n : 2*n])
				var ext netip.AddrPort
				if rest := key[2*n:]; len(rest) >= n+2 {
					answered, _ := netip.AddrFromSlice(rest[:n])
					ext = netip.AddrPortFrom(answered, binary.BigEndian.Uint16(rest[n:]))
				}
				f(opener, answerer, ext)
			}))
		}
	}
	return errors.Join(errs...)
}
