// Package selftest proves on the running kernel what conenatd does: it shows each
// behaviour with real packets in its own throw-away lab, with the program as a
// process in the gateway.
package selftest

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// A check is one behaviour. It runs in a lab with opts; run gets a stage whose
// daemon already runs, unless idle is set.
type check struct {
	name     string
	backends []string // that it is about; nil means each
	opts     lab.Options
	args     []string // of the daemon
	idle     bool
	run      func(*stage) error
}

// backends are the ways in which a permission can stand in the kernel.
var backends = []string{"expect", "nft"}

var checks = []check{
	{
		name: "a peer answers from any port, nobody else does",
		run:  func(s *stage) error { _, err := s.seed(); return err },
	},
	{
		name:     "a drop policy with established,related is passed",
		backends: []string{"expect"},
		opts:     lab.Options{Rules: lab.Masquerade + lab.DropPolicy},
		run:      func(s *stage) error { _, err := s.seed(); return err },
	},
	{
		name:     "a drop policy with established,related and ct status dnat is passed",
		backends: []string{"nft"},
		opts:     lab.Options{Rules: lab.Masquerade + lab.DropPolicy + "insert rule inet filter forward ct status dnat accept\n"},
		run:      func(s *stage) error { _, err := s.seed(); return err },
	},
	{
		name:     "the kernel learns while the daemon hangs",
		backends: []string{"nft"},
		run:      (*stage).learns,
	},
	{
		name: "outside ports moved by NAT are followed",
		opts: lab.Options{Rules: lab.MasqueradeRange(50000, 50999)},
		run:  func(s *stage) error { _, err := s.seed(); return err },
	},
	{
		name:     "routed IPv6: a peer answers from any port",
		backends: []string{"expect"},
		opts:     lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy},
		args:     []string{"--subnet", lab.InsideNet6.String(), "--routed"},
		run:      (*stage).routed6,
	},
	{
		name: "children inherit the connmark",
		opts: lab.Options{Rules: lab.Masquerade + markRules},
		run:  (*stage).connmark,
	},
	{
		name: "an early packet does not lock its peer out",
		run:  (*stage).early,
	},
	{
		name: "a port that the gateway serves stays its own",
		idle: true,
		run:  (*stage).served,
	},
	{
		name: "a flow older than the daemon gets its permission",
		idle: true,
		run:  (*stage).older,
	},
	{
		name: "a killed daemon leaves what works, the next one takes over",
		run:  (*stage).restart,
	},
	{
		name:     "a contact with one of a group permits all",
		backends: []string{"nft"},
		args:     []string{"--subnet", lab.InsideNet.String(), "--peer-group", "192.0.2.76/31", "--max-children=0"},
		run:      (*stage).group,
	},
	{
		name: "a stop leaves nothing in the kernel",
		run:  (*stage).stopped,
	},
}

// ErrFailed says that at least one behaviour is not as promised.
var ErrFailed = errors.New("selftest failed")

// Run runs all checks for each backend with the program exe, and writes a line for
// each: whether it passed, and if not, why. The error is ErrFailed, or says why
// nothing could be tried. It is no failure if the kernel lacks one of the two
// backends.
func Run(w io.Writer, exe string) error {
	failed, missing := false, 0
	for _, backend := range backends {
		starts := check{run: func(*stage) error { return nil }}
		if err := starts.try(exe, backend); errors.Is(err, lab.ErrPrivilege) {
			return err
		} else if err != nil {
			missing++
			fmt.Fprintf(w, "none  %s: %v\n", backend, oneLine(err))
			continue
		}
		for _, c := range checks {
			if c.backends != nil && !slices.Contains(c.backends, backend) {
				continue
			}
			if err := c.try(exe, backend); err != nil {
				failed = true
				fmt.Fprintf(w, "FAIL  %s: %s: %v\n", backend, c.name, oneLine(err))
				continue
			}
			fmt.Fprintf(w, "pass  %s: %s\n", backend, c.name)
		}
	}
	if failed || missing == len(backends) {
		return ErrFailed
	}
	return nil
}

// oneLine is the text of err on one line.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}

func (c *check) try(exe, backend string) (err error) {
	l, err := lab.New(c.opts)
	if err != nil {
		return err
	}
	defer l.Close()
	s := &stage{Lab: l, exe: exe, args: c.args}
	if s.args == nil {
		s.args = []string{"--subnet", lab.InsideNet.String()}
	}
	s.args = append([]string{"--backend", backend}, s.args...)
	defer s.close()
	if !c.idle {
		if err := s.start(); err != nil {
			return err
		}
	}
	return c.run(s)
}

// A stage is a lab with its daemon and sockets.
type stage struct {
	*lab.Lab
	exe     string
	args    []string
	d       *lab.Daemon
	sockets []*lab.Socket
}

func (s *stage) start() (err error) {
	s.d, err = s.StartDaemon(s.exe, s.args...)
	return err
}

func (s *stage) stop() error {
	d := s.d
	s.d = nil
	return d.Stop()
}

func (s *stage) close() {
	for _, sock := range s.sockets {
		sock.Close()
	}
	if s.d != nil {
		_ = s.d.Kill() // the check's error says what went wrong
	}
}

// open opens sockets, to be closed with the stage.
func (s *stage) open(n *lab.Host, addr netip.Addr, ports ...uint16) (socks []*lab.Socket, err error) {
	for _, port := range ports {
		sock, e := n.Socket(addr, port)
		if e != nil {
			return nil, e
		}
		s.sockets = append(s.sockets, sock)
		socks = append(socks, sock)
	}
	return socks, nil
}

// cast opens the SIP device, its proxy on two ports, and a stranger.
func (s *stage) cast() (device, proxy, other, stranger *lab.Socket, err error) {
	in, err := s.open(s.Inside(0), s.Inside(0).Addr, 5060)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	out, err := s.open(s.Outside, lab.PeerA, 5060, 5070)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	strange, err := s.open(s.Outside, lab.PeerC, 5060)
	if err != nil {
		return nil, nil, nil, nil, err
	}
	return in[0], out[0], out[1], strange[0], nil
}

// seed plays the question of 2003. It returns the outside endpoint.
func (s *stage) seed() (ext netip.AddrPort, err error) {
	device, proxy, other, stranger, err := s.cast()
	if err != nil {
		return ext, err
	}
	if ext, err = device.Contact(proxy); err != nil {
		return ext, err
	}
	return ext, s.cone(device, proxy, other, stranger, ext)
}

// cone checks that other, which has proxy's address, reaches device by ext, and
// stranger does not.
func (s *stage) cone(device, proxy, other, stranger *lab.Socket, ext netip.AddrPort) error {
	if err := lab.Arrives(device, lab.Packet{From: other, To: ext, Payload: "from the other port"}); err != nil {
		return err
	}
	return lab.Lost(device,
		lab.Packet{From: stranger, To: ext, Payload: "from a stranger"},
		lab.Packet{From: proxy, To: ext, Payload: "fence"})
}

func (s *stage) learns() error {
	if err := s.d.Pause(); err != nil {
		return err
	}
	if _, err := s.seed(); err != nil {
		return err
	}
	return s.d.Resume()
}

func (s *stage) routed6() error {
	in, err := s.open(s.Inside(0), s.Inside(0).Addr6, 5060)
	if err != nil {
		return err
	}
	out, err := s.open(s.Outside, lab.Peer6A, 5060, 5070)
	if err != nil {
		return err
	}
	strange, err := s.open(s.Outside, lab.Peer6B, 5060)
	if err != nil {
		return err
	}
	ext, err := in[0].Contact(out[0])
	if err != nil {
		return err
	}
	return s.cone(in[0], out[0], out[1], strange[0], ext)
}

const markRules = `table ip marks {
	chain forward {
		type filter hook forward priority mangle;
		iifname "lan0" ct state new ct mark set 0x2a
	}
}
`

func (s *stage) connmark() error {
	ext, err := s.seed()
	if err != nil {
		return err
	}
	lines, err := s.Conntrack("-p", "udp")
	if err != nil {
		return err
	}
	child := fmt.Sprintf("sport=5070 dport=%d ", ext.Port())
	for _, l := range lines {
		if strings.Contains(l, child) && strings.Contains(l, "mark=42 ") {
			return nil
		}
	}
	return fmt.Errorf("no child with mark 42 in %q", lines)
}

// early lets the peer send before the device does.
func (s *stage) early() error {
	device, proxy, other, stranger, err := s.cast()
	if err != nil {
		return err
	}
	if err := other.Send(netip.AddrPortFrom(s.Gateway.Addr, 5060), "early"); err != nil {
		return err
	}
	ext, err := device.Contact(proxy)
	if err != nil {
		return err
	}
	return s.cone(device, proxy, other, stranger, ext)
}

// served opens a socket on the outside port before the device uses that port.
func (s *stage) served() error {
	device, proxy, other, _, err := s.cast()
	if err != nil {
		return err
	}
	own, err := s.open(s.Gateway, s.Gateway.Addr, 5060)
	if err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	ext, err := device.Contact(proxy)
	if err != nil {
		return err
	}
	if err := other.Send(ext, "for the gateway"); err != nil {
		return err
	}
	_, err = own[0].Expect("for the gateway")
	return err
}

func (s *stage) older() error {
	device, proxy, other, stranger, err := s.cast()
	if err != nil {
		return err
	}
	ext, err := device.Contact(proxy)
	if err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	return s.cone(device, proxy, other, stranger, ext)
}

func (s *stage) restart() error {
	ext, err := s.seed()
	if err != nil {
		return err
	}
	device := s.sockets[0]
	for _, step := range []struct {
		port uint16
		then func() error
	}{
		{6000, func() error { return s.d.Kill() }},
		{6001, s.start},
		{6002, func() error { return nil }},
	} {
		if err := step.then(); err != nil {
			return err
		}
		more, err := s.open(s.Outside, lab.PeerA, step.port)
		if err != nil {
			return err
		}
		payload := fmt.Sprintf("from port %d", step.port)
		if err := lab.Arrives(device, lab.Packet{From: more[0], To: ext, Payload: payload}); err != nil {
			return err
		}
	}
	return nil
}

// group lets the device contact a neighbour of the stranger.
func (s *stage) group() error {
	device, _, _, stranger, err := s.cast()
	if err != nil {
		return err
	}
	neighbor, err := s.open(s.Outside, lab.PeerC.Prev(), 5060)
	if err != nil {
		return err
	}
	ext, err := device.Contact(neighbor[0])
	if err != nil {
		return err
	}
	return lab.Arrives(device, lab.Packet{From: stranger, To: ext, Payload: "from one of the group"})
}

func (s *stage) stopped() error {
	if _, err := s.seed(); err != nil {
		return err
	}
	if err := s.stop(); err != nil {
		return err
	}
	expectations, err := s.Conntrack("expect")
	if err != nil {
		return err
	}
	entries, err := s.Conntrack("-p", "udp")
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(l string) bool {
		return !strings.Contains(l, "port=0 ") && !strings.Contains(l, "sport=5070")
	})
	rules, err := s.Ruleset()
	if err != nil {
		return err
	}
	if strings.Contains(rules, "conenat") {
		entries = append(entries, rules)
	}
	if left := append(expectations, entries...); len(left) > 0 {
		return fmt.Errorf("left: %q", left)
	}
	return nil
}
