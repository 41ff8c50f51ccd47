package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"time"

	"github.com/pion/stun/v3"
	"golang.org/x/sync/errgroup"
)

// Answers are what the tests with one address of a server gave. An invalid endpoint or address
// is an answer that did not come.
type Answers struct {
	Server netip.AddrPort
	Other  netip.AddrPort // OTHER-ADDRESS
	Origin netip.AddrPort // RESPONSE-ORIGIN of the first answer
	Silent error          // why there is no first answer; the rest but Server and Inside is then unknown

	Inside   netip.Addr   // this host's own
	Own      []netip.Addr // all of this host
	Outsides []netip.Addr // those that the server saw, from several sockets

	// What the server saw of one socket that sent to four endpoints (RFC 5780 section 4.3:
	// tests I, II and III; the fourth is ours).
	Local                                 netip.AddrPort // of the socket
	AtServer, AtHost, AtOther, AtOnlyPort netip.AddrPort

	// What came back to another socket that has sent to Server only, from the other address
	// and port, and from the other port (section 4.4: tests II and III).
	FromOther, FromPort Reply
	// The same for a socket that has sent to both. If nothing comes here either, the reason
	// is not a filter.
	CheckOther, CheckPort Reply

	Hairpin  Hairpin
	Asked    bool      // for the lifetime
	Lifetime *Lifetime // nil: not asked for, or not known
}

// A Reply is what became of a request with CHANGE-REQUEST.
type Reply int

// Replies.
const (
	NotAsked  Reply = iota
	None            // no answer
	Changed         // from the endpoint asked for
	Elsewhere       // from another endpoint: the server ignores CHANGE-REQUEST
	Refused         // an error: the server does not know CHANGE-REQUEST
)

// Options of Run.
type Options struct {
	Server Server
	From   netip.Addr // own address to send from; invalid: what the routes choose
	// Lifetime is the longest silence for which the lifetime of mappings is tried, at most
	// MaxLifetime; 0: it is not tested.
	Lifetime time.Duration
	rto      time.Duration
}

// Run asks the server, at one address for each family that both sides have. Silence is no
// error, but part of the report. Without any silence it takes a few round trips, otherwise
// up to 17 seconds, and with Lifetime as much longer.
func Run(ctx context.Context, o Options) (Report, error) {
	if o.rto == 0 {
		o.rto = initialRTO
	}
	servers, err := o.Server.resolve(ctx, o.From)
	if err != nil {
		return Report{}, err
	}
	var all []Answers
	for _, s := range servers {
		a, err := measure(ctx, o, s)
		if err != nil {
			return Report{}, fmt.Errorf("probe with %v: %w", s, err)
		}
		all = append(all, a)
	}
	r := Report{Server: o.Server.String()}
	for _, a := range routed(all) {
		r.Results = append(r.Results, Classify(&a))
	}
	return r, nil
}

// routed leaves out the families that this host does not have, unless it has none: a host
// without IPv6 needs no verdict about it.
func routed(all []Answers) []Answers {
	some := slices.DeleteFunc(slices.Clone(all), func(a Answers) bool { return errors.Is(a.Silent, errNoRoute) })
	if len(some) == 0 {
		return all
	}
	return some
}

// Why there is no first answer.
var (
	errNoRoute = errors.New("this host has no route there")
	errClosed  = errors.New("no program there has this UDP port open, or a firewall on the way rejects the packets (ICMP port unreachable)")
	errReject  = errors.New("a router or a firewall on the way rejects the packets (ICMP)")
	errLocal   = errors.New("this host's own firewall does not let the packets out")
	errSilence = errors.New("the server is down, or UDP to it is blocked on the way")
)

// reason sorts an error of a socket that is connected to the server.
func reason(err error) error {
	switch {
	case err == nil:
		return errSilence
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH):
		return errReject
	case errors.Is(err, syscall.ECONNREFUSED):
		return errClosed
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return errLocal
	}
	return err
}

func measure(ctx context.Context, o Options, server netip.AddrPort) (Answers, error) {
	a := Answers{Server: server, Inside: o.From}
	if err := a.greet(ctx, o); err != nil || a.Silent != nil {
		return a, err
	}
	var err error
	if a.Own, err = ownAddresses(); err != nil {
		return a, err
	}
	// No socket may have sent to the other address when filtering is tested: a NAT that
	// filters for the whole host would let its answers in.
	var filtering, hairpin netip.Addr // as they were seen
	g, inner := errgroup.WithContext(ctx)
	g.Go(func() (err error) { filtering, err = a.filter(inner, o); return err })
	g.Go(func() (err error) { hairpin, err = a.loop(inner, o); return err })
	if err := g.Wait(); err != nil {
		return a, err
	}
	a.saw(filtering)
	a.saw(hairpin)
	if err := a.mapping(ctx, o); err != nil || o.Lifetime == 0 {
		return a, err
	}
	a.Asked = true
	return a, a.lifetime(ctx, o)
}

func (a *Answers) saw(outside netip.Addr) {
	if outside.IsValid() && !slices.Contains(a.Outsides, outside) {
		a.Outsides = append(a.Outsides, outside)
	}
}

// greet asks the server from a connected socket, which learns of ICMP errors. The address that
// the routes choose for it is that of all others.
func (a *Answers) greet(ctx context.Context, o Options) error {
	var local *net.UDPAddr
	if o.From.IsValid() {
		local = &net.UDPAddr{IP: o.From.AsSlice(), Zone: o.From.Zone()}
	}
	c, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(a.Server))
	switch {
	case errors.Is(err, syscall.ENETUNREACH), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EADDRNOTAVAIL):
		a.Silent = errNoRoute
		return nil
	case err != nil:
		a.Silent = reason(err)
		return nil
	}
	defer c.Close()
	a.Inside = c.LocalAddr().(*net.UDPAddr).AddrPort().Addr().Unmap()
	first := &request{}
	switch err := exchange(ctx, o.rto, c, c, first); {
	case ctx.Err() != nil:
		return ctx.Err()
	case err != nil:
		a.Silent = reason(err)
		return nil
	case first.answer == nil:
		a.Silent = reason(first.failed)
		return nil
	}
	seen := first.mapped()
	if !seen.IsValid() {
		a.Silent = fmt.Errorf("the server answers, but does not say what it sees (%s): it is no STUN server for everybody", first.answer.Type)
		return nil
	}
	a.saw(seen.Addr())
	a.Origin = first.attribute(stun.AttrResponseOrigin)
	if other := first.attribute(stun.AttrOtherAddress); other.Addr().Is4() == a.Server.Addr().Is4() && other != a.Server {
		a.Other = other
	}
	return nil
}

// socket opens an unconnected socket on the inside address.
func (a *Answers) socket() (*net.UDPConn, error) {
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(a.Inside, 0)))
	if err != nil {
		return nil, fmt.Errorf("open UDP socket: %w", err)
	}
	return c, nil
}

// filter tests filtering (RFC 5780 section 4.4).
func (a *Answers) filter(ctx context.Context, o Options) (outside netip.Addr, err error) {
	c, err := a.socket()
	if err != nil {
		return outside, err
	}
	defer c.Close()
	first := &request{to: a.Server}
	if err := exchange(ctx, o.rto, c, c, first); err != nil || !first.mapped().IsValid() || !a.Other.IsValid() {
		return first.mapped().Addr(), err
	}
	a.FromOther, a.FromPort, err = a.change(ctx, o, c)
	return first.mapped().Addr(), err
}

// change asks the server to answer from its other address and port, and from its other port.
func (a *Answers) change(ctx context.Context, o Options, c *net.UDPConn) (other, port Reply, err error) {
	both := &request{to: a.Server, change: changeIP | changePort}
	only := &request{to: a.Server, change: changePort}
	var requests []*request
	if a.Other.Addr() != a.Server.Addr() {
		requests = append(requests, both)
	}
	if a.Other.Port() != a.Server.Port() {
		requests = append(requests, only)
	}
	err = exchange(ctx, o.rto, c, c, requests...)
	return both.reply(a.Other), only.reply(netip.AddrPortFrom(a.Server.Addr(), a.Other.Port())), err
}

func (r *request) reply(want netip.AddrPort) Reply {
	switch {
	case r.message == nil:
		return NotAsked
	case r.answer == nil:
		return None
	case r.answer.Type != stun.BindingSuccess:
		return Refused
	case r.from != want:
		return Elsewhere
	}
	return Changed
}

// mapping tests mapping (RFC 5780 section 4.3). Its socket has then sent to all endpoints of
// the server, so it checks as well whether silence in the other tests was a filter's.
func (a *Answers) mapping(ctx context.Context, o Options) error {
	c, err := a.socket()
	if err != nil {
		return err
	}
	defer c.Close()
	a.Local = netip.AddrPortFrom(a.Inside, c.LocalAddr().(*net.UDPAddr).AddrPort().Port())
	server := &request{to: a.Server}
	host := &request{to: netip.AddrPortFrom(a.Other.Addr(), a.Server.Port())}
	other := &request{to: a.Other}
	port := &request{to: netip.AddrPortFrom(a.Server.Addr(), a.Other.Port())}
	requests := []*request{server}
	if a.Other.IsValid() {
		for _, r := range []*request{host, other, port} {
			if !slices.ContainsFunc(requests, func(q *request) bool { return q.to == r.to }) {
				requests = append(requests, r)
			}
		}
	}
	if err := exchange(ctx, o.rto, c, c, requests...); err != nil {
		return err
	}
	a.AtServer, a.AtHost, a.AtOther, a.AtOnlyPort = server.mapped(), host.mapped(), other.mapped(), port.mapped()
	a.saw(a.AtServer.Addr())
	if a.FromOther == None || a.FromPort == None {
		a.CheckOther, a.CheckPort, err = a.change(ctx, o, c)
	}
	return err
}

// loop tests hairpinning (RFC 5780 section 4.5): a second socket sends to the outside endpoint
// of the first.
func (a *Answers) loop(ctx context.Context, o Options) (outside netip.Addr, err error) {
	one, err := a.socket()
	if err != nil {
		return outside, err
	}
	defer one.Close()
	two, err := a.socket()
	if err != nil {
		return outside, err
	}
	defer two.Close()
	first := &request{to: a.Server}
	if err := exchange(ctx, o.rto, one, one, first); err != nil {
		return outside, err
	}
	seen := first.mapped()
	switch {
	case !seen.IsValid():
		a.Hairpin = HairpinUnknown
		return outside, nil
	case seen == netip.AddrPortFrom(a.Inside, one.LocalAddr().(*net.UDPAddr).AddrPort().Port()):
		a.Hairpin = HairpinNone
		return seen.Addr(), nil
	}
	looped := &request{to: seen}
	err = exchange(ctx, o.rto, two, one, looped)
	a.Hairpin = HairpinNo
	if looped.answer != nil {
		a.Hairpin = HairpinYes
	}
	return seen.Addr(), err
}
