// Package demo plays, in a throw-away lab without conenatd and with it, the
// question that a VoIP developer asked on the kernel list in 2003. It fails if the
// result is not as it claims.
package demo

import (
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

const (
	sipPort    = 5060
	answerPort = 5070
)

// Run plays the demo and writes the story to w. It starts the running program
// itself as the daemon.
func Run(w io.Writer) error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program: %w", err)
	}
	l, err := lab.New(lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	if err != nil {
		return err
	}
	defer l.Close()
	p := &play{lab: l, w: w}
	if err := p.cast(); err != nil {
		return err
	}
	defer p.close()
	return p.run(exe)
}

// A play has a SIP device inside, its proxy with two ports, and a stranger.
type play struct {
	lab *lab.Lab
	w   io.Writer

	device, proxy, proxyOther, stranger *lab.Socket
}

func (p *play) cast() (err error) {
	inside, outside := p.lab.Inside(0), p.lab.Outside
	if p.device, err = inside.Socket(inside.Addr, sipPort); err != nil {
		return err
	}
	if p.proxy, err = outside.Socket(lab.PeerA, sipPort); err != nil {
		return err
	}
	if p.proxyOther, err = outside.Socket(lab.PeerA, answerPort); err != nil {
		return err
	}
	p.stranger, err = outside.Socket(lab.PeerC, answerPort)
	return err
}

func (p *play) close() {
	for _, s := range []*lab.Socket{p.device, p.proxy, p.proxyOther, p.stranger} {
		s.Close()
	}
}

func (p *play) say(format string, args ...any) { fmt.Fprintf(p.w, format+"\n", args...) }

func (p *play) run(exe string) error {
	p.say("A SIP device %v behind a Linux gateway (masquerade, drop policy) sends to its", p.device.Addr())
	p.say("proxy %v. The proxy answers from port %d.\n", p.proxy.Addr(), answerPort)

	p.say("Without conenatd:")
	if err := p.act(false); err != nil {
		return err
	}
	if err := p.lab.Flush(); err != nil {
		return err
	}

	p.say("\nWith conenatd run --subnet %v:", lab.InsideNet)
	d, err := p.lab.StartDaemon(exe, "--subnet", lab.InsideNet.String())
	if err != nil {
		return err
	}
	if err := p.act(true); err != nil {
		return fmt.Errorf("%w\n%s", err, d.Output())
	}
	for _, args := range [][]string{{"-p", "udp"}, {"expect"}} {
		lines, err := p.lab.Conntrack(args...)
		if err != nil {
			return err
		}
		p.say("\n  # conntrack -L %s", strings.Join(args, " "))
		for _, l := range lines {
			p.say("  %s", note(l))
		}
	}
	if err := d.Stop(); err != nil {
		return err
	}
	left, err := p.lab.Conntrack("expect")
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return fmt.Errorf("the daemon left %q in the kernel", left)
	}
	p.say("\nconenatd stopped and took everything it made out of the kernel.")
	return nil
}

// note adds to a line of conntrack -L what the entry is.
func note(line string) string {
	switch {
	case strings.Contains(line, "PERMANENT"):
		return line + "   <- the permission"
	case strings.Contains(line, "sport=0 "):
		return line + "   <- its anchor"
	case strings.Contains(line, fmt.Sprintf("sport=%d dport=%d", answerPort, sipPort)):
		return line + "   <- the answer from the other port"
	}
	return line
}

// act lets the device call its proxy, and shows whose answers get through. open
// says whether the proxy's other port should; any other result is an error.
func (p *play) act(open bool) error {
	ext, err := p.device.Contact(p.proxy)
	if err != nil {
		return err
	}
	p.say("  %v -> %v   REGISTER leaves as %v", p.device.Addr(), p.proxy.Addr(), ext)
	fence := lab.Packet{From: p.proxy, To: ext, Payload: "200 OK"}
	if open {
		err = lab.Arrives(p.device, lab.Packet{From: p.proxyOther, To: ext, Payload: "INVITE"})
	} else {
		err = lab.Lost(p.device, lab.Packet{From: p.proxyOther, To: ext, Payload: "INVITE"}, fence)
	}
	if err != nil {
		return fmt.Errorf("answer from the proxy's port %d: %w", answerPort, err)
	}
	p.say("  %v -> %v   from the proxy's other port: %s", p.proxyOther.Addr(), ext, outcome(open))
	err = lab.Lost(p.device, lab.Packet{From: p.stranger, To: ext, Payload: "spam"}, fence)
	if err != nil {
		return fmt.Errorf("packet from a stranger: %w", err)
	}
	p.say("  %v -> %v   from another address: %s", p.stranger.Addr(), ext, outcome(false))
	return nil
}

func outcome(arrives bool) string {
	if arrives {
		return "ARRIVES"
	}
	return "lost"
}
