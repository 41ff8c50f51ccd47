package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/lab"
)

// A fault is something that is wrong on a gateway, and that doctor has lines for.
type fault struct {
	id, about string // of the finding; about may be empty for any
	options   lab.Options
	set       func(s *scene) // makes the fault before the daemon starts
	top       string         // of the configuration
	subnet    string         // in the part of the subnet, beside its prefix
	prefix    string         // of the subnet; empty: the inside network
	running   bool           // with a daemon
	later     func(s *scene) // makes the fault, or shows it, while the daemon runs
	again     func(s *scene) // shows that it is gone
	line      string         // one of the lines that doctor must print
	// lost says that a peer's packet from another port is lost with the fault, and arrives
	// without it.
	lost bool
	// cut says that the host reaches nobody with the fault.
	cut bool
}

// A patient is a scene with a fault.
type patient struct {
	*scene
	fault
	config string // path
}

// doctor runs "conenatd doctor --json" and checks the exit status.
func (p *patient) doctor() (r doctor.Report) {
	p.T.Helper()
	out, code := p.CLI("doctor", "--json", "--config", p.config)
	if err := json.Unmarshal([]byte(out), &r); err != nil || code != r.Status() {
		p.T.Fatalf("exit %d, %v: %s", code, err, out)
	}
	if r.Daemon != (p.Daemon != nil) {
		p.T.Fatalf("daemon: %v", r.Daemon)
	}
	return r
}

// finding returns the finding of the fault.
func (p *patient) finding() *doctor.Finding {
	p.T.Helper()
	all := p.doctor().Findings
	i := slices.IndexFunc(all, func(f doctor.Finding) bool { return f.ID == p.id && (p.about == "" || f.About == p.about) })
	if i < 0 {
		return nil
	}
	return &all[i]
}

// write writes the configuration, with lines that doctor gave.
func (p *patient) write(lines ...doctor.Line) {
	p.T.Helper()
	for _, l := range lines {
		if l.In == doctor.File {
			p.top = dropKey(p.top, l.Line) + l.Line + "\n"
		} else {
			p.subnet += l.Line + "\n"
		}
	}
	prefix := p.prefix
	if prefix == "" {
		prefix = lab.InsideNet.String()
	}
	text := fmt.Sprintf("reconcile = \"1s\"\n%s[[subnet]]\nprefix = %q\n%s", p.top, prefix, p.subnet)
	if prefix == "none" {
		text = p.top
	}
	p.Must(os.WriteFile(p.config, []byte(text), 0o644))
}

// dropKey leaves out the key that a line sets anew.
func dropKey(text, line string) (out string) {
	key, _, _ := strings.Cut(line, " ")
	for l := range strings.Lines(text) {
		if !strings.HasPrefix(l, key+" ") {
			out += l
		}
	}
	return out
}

// apply does what the lines say.
func (p *patient) apply(lines []doctor.Line) {
	p.T.Helper()
	for _, l := range lines {
		switch {
		case l.In != doctor.Shell:
			p.write(l)
			if out, code := p.CLI("reload"); p.Daemon != nil && code != 0 {
				p.T.Fatalf("reload: %s\n%s", out, p.Daemon.Output())
			}
		case strings.HasPrefix(l.Line, "conenatd run "):
			p.Start(append(strings.Fields(l.Line)[2:], "--reconcile=1s")...)
		default:
			p.shell(l.Line)
		}
	}
}

// shell runs a line in the gateway.
func (p *patient) shell(line string) {
	p.T.Helper()
	p.runShell("conenatd", p.Exe, line)
}

// reaches checks that a peer's packet from another port arrives at the host, or is lost.
func (p *patient) reaches(port uint16, arrives bool) {
	p.T.Helper()
	host, peerA, peerC := p.Inside(0).Addr, lab.PeerA, lab.PeerC
	if strings.Contains(p.prefix, ":") {
		host, peerA, peerC = p.Inside(0).Addr6, lab.Peer6A, lab.Peer6B
	}
	phone, proxy := p.Socket(p.Inside(0).Namespace, host, port), p.Socket(p.Outside.Namespace, peerA, port)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
	other := p.Socket(p.Outside.Namespace, peerA, port+1)
	if !arrives {
		p.Lost(phone, other, ext, proxy)
		return
	}
	p.Arrives(phone, other, ext)
	p.Lost(phone, p.Socket(p.Outside.Namespace, peerC, port+1), ext, proxy)
}

// cure shows a fault, applies the lines and checks that they repair it. It returns the language
// of the lines.
func (tt fault) cure(t *testing.T) doctor.Firewall {
	if os.Getenv(stage.ModeEnv) != "" {
		t.Skip("it chooses its backends itself")
	}
	p := &patient{newScene(t, tt.options), tt, filepath.Join(t.TempDir(), "conenatd.toml")}
	if tt.set != nil {
		tt.set(p.scene)
	}
	p.write()
	if tt.running {
		p.Start("--config", p.config)
	}
	if tt.later != nil {
		tt.later(p.scene)
	}
	var f *doctor.Finding
	if tt.running {
		p.Until("doctor finds "+tt.id, func() bool { f = p.finding(); return f != nil })
	} else if f = p.finding(); f == nil {
		t.Fatalf("doctor does not find %s: %+v", tt.id, p.doctor())
	}
	if !slices.ContainsFunc(f.Fix, func(l doctor.Line) bool { return l.Line == tt.line }) {
		t.Fatalf("it is repaired by %+v, want %q", f, tt.line)
	}
	if f.What == "" || f.Why == "" {
		t.Errorf("%+v", f)
	}
	language := p.doctor().Firewall
	p.saysWhatThen(f)
	if tt.lost {
		p.reaches(6000, false)
	}
	host, peer := p.InsideSocket(0, 6100), p.PeerSocket(lab.PeerA, 6100)
	if tt.cut {
		p.noAnswer(host, peer)
	}
	p.apply(f.Fix)
	if p.Daemon != nil {
		if tt.again != nil {
			tt.again(p.scene)
		}
		p.Until("the fault is gone", func() bool { return p.finding() == nil })
	} else if f := p.finding(); f != nil {
		t.Fatalf("the lines do not repair it: %+v", f)
	}
	if tt.lost {
		p.reaches(6010, true)
	}
	if tt.cut {
		if ext := p.Contact(p.InsideSocket(0, 6101), peer); ext.Addr() != p.Gateway.Addr {
			t.Errorf("the host is seen as %v", ext)
		}
	}
	return language
}

// saysWhatThen checks that the text says how a line for the configuration takes effect, and with
// which flag of "run" where there is no configuration file.
func (p *patient) saysWhatThen(f *doctor.Finding) {
	p.T.Helper()
	out, _ := p.CLI("doctor", "--config", p.config)
	text := strings.Join(strings.Fields(out), " ")
	help, _ := p.CLI("run", "--help")
	for _, l := range f.Fix {
		key, _, _ := strings.Cut(l.Line, " ")
		flag := "--" + strings.ReplaceAll(key, "_", "-")
		if l.In != doctor.Shell && (!strings.Contains(text, "Then: 'conenatd reload'. Without a configuration file, start the daemon again with "+flag) || !strings.Contains(help, " "+flag+" ")) {
			p.T.Errorf("nothing says what to do with %q: %s", l.Line, out)
		}
	}
}

// noAnswer checks that the peer cannot answer the host: it gets nothing, or a packet with a
// private source.
func (p *patient) noAnswer(host, peer *lab.Socket) {
	p.T.Helper()
	text := stage.Payload("no answer")
	p.Must(host.Send(peer.Addr(), text))
	// The gateway itself is in front of the fault: what it sends later comes later.
	gate := p.Socket(p.Gateway.Namespace, p.Gateway.Addr, 6102)
	fence := stage.Payload("fence")
	p.Must(gate.Send(peer.Addr(), fence))
	for {
		got, from, err := peer.Recv(stage.Patience())
		p.Must(err)
		if got == fence {
			return
		}
		if got == text && from.Addr() == p.Gateway.Addr {
			p.T.Fatalf("the peer can answer: it comes from %v", from)
		}
	}
}

// Each line that doctor prints repairs what it was printed for.
//
// Fails when a line is wrong, when a finding does not go away, and when packets do not pass
// although doctor has nothing to say.
func TestDoctorsLinesRepair(t *testing.T) {
	stage.OfTheDaemon(t)
	applied, cured := map[string][]doctor.Firewall{}, 0
	for name, tt := range faults {
		t.Run(name, func(t *testing.T) {
			applied[tt.id] = append(applied[tt.id], tt.cure(t))
			cured++
		})
	}
	if cured == len(faults) {
		languages(t, applied)
	} else {
		t.Logf("%d of %d faults were repaired: not checked whether lines of each firewall were applied", cured, len(faults))
	}
}

// IPv6 leaves by a tunnel that has no IPv4, which no rule translates by and whose rp_filter is
// strict. Fails when doctor takes the tunnel for an outside link of IPv4: by its default route
// alone, with an address for its management, or because the user names it.
func TestDoctorAsksNoIPv4OfAnOutsideLinkForIPv6(t *testing.T) {
	for name, tc := range map[string]struct {
		addr4 string
		top   string
	}{
		"a default route":       {},
		"an address for itself": {addr4: "192.0.2.9/30"},
		"named":                 {top: "outside = [\"wan0\", \"tun6\"]\n"},
	} {
		for _, running := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, a daemon %v", name, running), func(t *testing.T) {
				p := &patient{newScene(t, lab.Options{IPv6: true}), fault{top: tc.top}, filepath.Join(t.TempDir(), "conenatd.toml")}
				p.AddLink("tun6", "192.0.2.1")
				p.IP(p.Gateway, "-4 addr flush dev tun6")
				if tc.addr4 != "" {
					p.IP(p.Gateway, "addr add "+tc.addr4+" dev tun6")
				}
				p.IP(p.Gateway, "-6 route replace default dev tun6")
				sets("sysctl -w net.ipv4.conf.all.rp_filter=1", "sysctl -w net.ipv4.conf.wan0.rp_filter=2", "sysctl -w net.ipv4.conf.tun6.forwarding=0")(p.scene)
				if p.write(); running {
					p.Start("--config", p.config)
				}
				for _, f := range p.doctor().Findings {
					if strings.Contains(f.What+f.About, "tun6") {
						t.Errorf("%s: %s", f.ID, f.What)
					}
				}
			})
		}
	}
}

// The user's SIP helper works for a phone, so there is no expectation for its proxy, and the
// forward chain drops what the map admits.
//
// Fails when doctor or the verdict is content although the proxy's other port is lost.
func TestDoctorKnowsHelpers(t *testing.T) {
	stage.OfTheDaemon(t)
	tt := fault{id: dropped, options: lab.Options{Rules: lab.Masquerade + lab.DropPolicy + sipHelper}, about: lab.InsideNet.String() + " helper"}
	p := &patient{newScene(t, tt.options), tt, filepath.Join(t.TempDir(), "conenatd.toml")}
	p.write()
	p.Start("--config", p.config)
	phone, proxy := p.InsideSocket(0, 5060), p.PeerSocket(lab.PeerA, 5060)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
	var f *doctor.Finding
	p.Until("doctor finds it", func() bool { f = p.finding(); return f != nil })
	if got := p.verdict(); !strings.HasPrefix(got, "works in part: ") {
		t.Errorf("verdict %q", got)
	}
	p.Lost(phone, p.PeerSocket(lab.PeerA, 5070), ext, proxy)
	p.apply(f.Fix)
	p.Until("the fault is gone", func() bool { return p.finding() == nil })
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 5071), ext)
	p.Lost(phone, p.PeerSocket(lab.PeerC, 5071), ext, proxy)
}
