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
	run      func(*stage)
}

// backends are the ways in which a permission can stand in the kernel.
var backends = []string{"expect", "nft"}

var checks = []check{
	{
		name: "a peer answers from any port, nobody else does",
		run:  func(s *stage) { s.seed() },
	},
	{
		name:     "a drop policy with established,related is passed",
		backends: []string{"expect"},
		opts:     lab.Options{Rules: lab.Masquerade + lab.DropPolicy},
		run:      func(s *stage) { s.seed() },
	},
	{
		name:     "a drop policy with established,related and ct status dnat is passed",
		backends: []string{"nft"},
		opts:     lab.Options{Rules: lab.Masquerade + lab.DropPolicy + "insert rule inet filter forward ct status dnat accept\n"},
		run:      func(s *stage) { s.seed() },
	},
	{
		name:     "the kernel learns while the daemon hangs",
		backends: []string{"nft"},
		run:      (*stage).learns,
	},
	{
		name: "outside ports moved by NAT are followed",
		opts: lab.Options{Rules: lab.MasqueradeRange(50000, 50999)},
		run:  func(s *stage) { s.seed() },
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
		starts := check{run: func(*stage) {}}
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

func (c *check) try(exe, backend string) error {
	args := c.args
	if args == nil {
		args = []string{"--subnet", lab.InsideNet.String()}
	}
	return onStage(c.opts, exe, append([]string{"--backend", backend}, args...), func(s *stage) {
		if !c.idle {
			s.start()
		}
		c.run(s)
	})
}

func (s *stage) learns() {
	must(s.d.Pause())
	s.seed()
	must(s.d.Resume())
}

func (s *stage) routed6() {
	c := s.cast6()
	c.admits(c.contact())
}

const markRules = `table ip marks {
	chain forward {
		type filter hook forward priority mangle;
		iifname "lan0" ct state new ct mark set 0x2a
	}
}
`

func (s *stage) connmark() {
	child := fmt.Sprintf("sport=5070 dport=%d ", s.seed().Port())
	lines := get(s.Conntrack("-p", "udp"))
	for _, l := range lines {
		if strings.Contains(l, child) && strings.Contains(l, "mark=42 ") {
			return
		}
	}
	must(fmt.Errorf("no child with mark 42 in %q", lines))
}

// early lets the peer send before the device does.
func (s *stage) early() {
	c := s.cast()
	must(c.other.Send(netip.AddrPortFrom(s.Gateway.Addr, 5060), "early"))
	c.admits(c.contact())
}

// served opens a socket on the outside port before the device uses that port.
func (s *stage) served() {
	c, own := s.cast(), s.open(s.Gateway, s.Gateway.Addr, 5060)
	s.start()
	must(c.other.Send(c.contact(), "for the gateway"))
	get(own.Expect("for the gateway"))
}

func (s *stage) older() {
	c := s.cast()
	ext := c.contact()
	s.start()
	c.admits(ext)
}

func (s *stage) restart() {
	ext := s.seed()
	device := s.sockets[0]
	must(s.d.Kill())
	s.arrives(device, 6000, ext)
	s.start()
	s.arrives(device, 6001, ext)
	s.arrives(device, 6002, ext)
}

// group lets the device contact a neighbour of the stranger.
func (s *stage) group() {
	c := s.cast()
	ext := get(c.device.Contact(s.open(s.Outside, lab.PeerC.Prev(), 5060)))
	must(lab.Arrives(c.device, lab.Packet{From: c.stranger, To: ext, Payload: "from one of the group"}))
}

func (s *stage) stopped() {
	s.seed()
	s.stop()
	left := get(s.Conntrack("expect"))
	for _, l := range get(s.Conntrack("-p", "udp")) {
		if strings.Contains(l, "port=0 ") || strings.Contains(l, "sport=5070") {
			left = append(left, l)
		}
	}
	if rules := get(s.Ruleset()); strings.Contains(rules, "conenat") {
		left = append(left, rules)
	}
	if len(left) > 0 {
		must(fmt.Errorf("left: %q", left))
	}
}
