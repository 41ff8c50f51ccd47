package e2e

import (
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/docs"
	"github.com/conenatd/conenatd/internal/lab"
)

// installed is where the pages have the configuration.
const installed = "/etc/conenatd/conenatd.toml"

// An ailment is a section of docs/troubleshooting.md: how its fault comes about, and what shows
// that it is gone.
type ailment struct {
	options lab.Options
	set     func(s *scene) // makes the fault before the daemon starts
	config  string         // empty: the inside network alone
	stopped bool           // no daemon runs
	later   func(a *ailing)
	// cured shows that what the section says has helped.
	cured func(a *ailing)
}

// An ailing gateway has a fault.
type ailing struct {
	*scene
	config       string // path
	phone, proxy *lab.Socket
	ext          netip.AddrPort
	served       *lab.Socket // of the gateway
}

const insideSubnet = "[[subnet]]\nprefix = \"10.47.11.0/24\"\n"

var masqueraded = lab.Options{Rules: lab.Masquerade}

// calls lets a phone contact the proxy.
func calls(a *ailing) {
	a.T.Helper()
	a.phone, a.proxy = a.InsideSocket(0, 5060), a.PeerSocket(lab.PeerA, 5060)
	a.ext = a.Contact(a.phone, a.proxy)
}

// callsAndStands also waits for the permission.
func callsAndStands(a *ailing) {
	a.T.Helper()
	calls(a)
	a.Stands(a.phone, a.proxy, a.ext)
}

// isDeaf lets a phone call and shows that it does not get what the proxy sends from another port.
func isDeaf(a *ailing) {
	a.T.Helper()
	callsAndStands(a)
	a.Lost(a.phone, a.PeerSocket(lab.PeerA, 5070), a.ext, a.proxy)
}

// hears shows that a phone gets what its proxy sends from another port, and nobody else.
func hears(a *ailing) {
	a.T.Helper()
	hearsFrom(lab.PeerA)(a)
	a.Lost(a.phone, a.PeerSocket(lab.PeerC, 6071), a.ext, a.proxy)
}

// hearsFrom shows that a new call gets in what another address, or another port, sends.
func hearsFrom(from netip.Addr) func(a *ailing) {
	return func(a *ailing) {
		a.T.Helper()
		a.phone, a.proxy = a.InsideSocket(0, 6060), a.PeerSocket(lab.PeerA, 6060)
		a.ext = a.Contact(a.phone, a.proxy)
		a.Until("a permission of "+a.ext.String()+" stands", func() bool {
			for _, p := range a.List() {
				if p.Ext == a.ext && p.State == "standing" && p.Reason == "" {
					return true
				}
			}
			return false
		})
		a.Arrives(a.phone, a.PeerSocket(from, 6070), a.ext)
	}
}

// repeats shows that the phone, which goes on sending to its proxy, gets in what that sends from
// another port.
func repeats(a *ailing) {
	a.T.Helper()
	a.Until("the phone's permission stands", func() bool {
		a.Must(a.phone.Send(a.proxy.Addr(), "again"))
		for _, p := range a.List() {
			if a.ext = p.Ext; p.Int == a.phone.Addr() && p.State == "standing" {
				return true
			}
		}
		return false
	})
	a.Arrives(a.phone, a.PeerSocket(lab.PeerA, 6080), a.ext)
}

// ailments are the sections of docs/troubleshooting.md.
var ailments = map[string]ailment{
	"Begin here": {options: masqueraded, later: callsAndStands},
	"`status` finds no daemon, after a reboot for example": {
		stopped: true, config: "lifetme = \"3m\"\n" + insideSubnet,
	},
	"`list` is empty": {
		options: lab.Options{Rules: "table ip without_nat { }"},
		later:   func(a *ailing) { contacts(5, 1)(a.scene) }, cured: hears,
	},
	"`list` is empty, and hosts reach nobody": {options: masqueraded, set: sets("sysctl -w net.ipv4.ip_forward=0"), cured: hears},
	"`list` is empty, and the firewall lets nothing out": {
		options: lab.Options{Rules: lab.Masquerade + strings.Replace(established, `established accept
		iifname "lan0"`, `established,related accept; ct status dnat accept
		iifname "guest0"`, 1)}, cured: hears,
	},
	"`list` is empty, and the subnet is mistyped": {
		options: masqueraded, config: "[[subnet]]\nprefix = \"192.168.1.0/24\"\n", cured: hears,
	},
	"A host sends, and `list` does not have it": {
		options: masqueraded,
		later:   func(a *ailing) { a.Contact(a.InsideSocket(0, 5060), a.PeerSocket(lab.PeerA, 443)) },
		cured: func(a *ailing) {
			phone, proxy := a.InsideSocket(0, 6060), a.PeerSocket(lab.PeerB, 443)
			a.Arrives(phone, a.PeerSocket(lab.PeerB, 6070), a.Contact(phone, proxy))
		},
	},
	"One-way audio: the firewall drops what comes from another port": {
		options: lab.Options{Rules: lab.Masquerade + established}, later: isDeaf, cured: hears,
	},
	"One-way audio: the media comes from another address": {
		options: masqueraded, later: callsAndStands, cured: hearsFrom(lab.PeerB),
	},
	"One-way audio: a SIP helper is in the way": {
		options: lab.Options{Rules: lab.Masquerade + lab.DropPolicy + sipHelped}, later: isDeaf, cured: hears,
	},
	"A game says that the NAT type is strict": {
		options: lab.Options{Rules: strings.Replace(lab.Masquerade, "masquerade", "masquerade fully-random", 1)},
		cured: func(a *ailing) {
			game := a.InsideSocket(0, 3074)
			first := a.Contact(game, a.PeerSocket(lab.PeerA, 4000))
			if other := a.Contact(game, a.PeerSocket(lab.PeerC, 4000)); other != first {
				a.T.Errorf("peers see %v and %v", first, other)
			}
		},
	},
	"It works, and strangers still cannot call": {options: masqueraded, later: callsAndStands, cured: hearsFrom(lab.PeerC)},
	"Another NAT in front: double NAT or CGN": {
		options: lab.Options{Rules: lab.SNATTo(netip.MustParseAddr("100.64.0.2"))},
		set: func(s *scene) {
			s.IP(s.Gateway, "addr add 100.64.0.2/32 dev wan0")
			s.IP(s.Outside, "route add 100.64.0.2/32 via 198.51.100.1")
		},
		later: callsAndStands,
	},
	"The gateway or a forward has the port": {
		options: masqueraded,
		later: func(a *ailing) {
			a.served = a.Socket(a.Gateway.Namespace, a.Gateway.Addr, 5060)
			calls(a)
		},
		cured: func(a *ailing) {
			phone, proxy := a.phone, a.proxy
			hears(a) // on another port of the host
			a.Must(a.served.Close())
			a.phone, a.proxy = phone, proxy
			repeats(a)
		},
	},
	"After a reload of the firewall nothing gets in": {
		options: lab.Options{Rules: lab.Masquerade + established},
		later: func(a *ailing) {
			a.shell(`nft 'insert rule inet filter forward iifname "wan0" ct label 126 accept'`)
			callsAndStands(a)
			a.Arrives(a.phone, a.PeerSocket(lab.PeerA, 5070), a.ext)
			a.shell("nft flush ruleset || true") // the kernel leaves out tables with an owner
			a.Must(a.NFT(lab.Masquerade + established))
		},
		cured: hears,
	},
	"It stops after a minute or two of silence": {
		options: masqueraded, set: sets("sysctl -w net.netfilter.nf_conntrack_udp_timeout_stream=60"),
		cured: func(a *ailing) {
			if out, code := a.CLI("doctor"); code != 0 {
				a.T.Errorf("exit %d, %s", code, out)
			}
		},
	},
	"It stops when the uplink changes": {
		options: lab.Options{Rules: tracked},
		later: func(a *ailing) {
			a.phone, a.proxy = a.InsideSocket(0, 5060), a.PeerSocket(lab.PeerA, 5060)
			a.Must(a.phone.Send(a.proxy.Addr(), "before the rule"))
			a.Must(a.NFT(lab.Masquerade))
		},
		cured: repeats,
	},
	"It stopped after `revoke` or `flush`": {
		options: masqueraded,
		later: func(a *ailing) {
			callsAndStands(a)
			if out, code := a.CLI("revoke", "10.47.11.109"); code != 0 {
				a.T.Fatal(out)
			}
		},
		cured: repeats,
	},
	"IPv6": {
		options: lab.Options{IPv6: true, Rules: lab.DropPolicy}, config: "[[subnet]]\nprefix = \"2001:db8:47::/64\"\n",
		cured: func(a *ailing) {
			phone, proxy := a.Socket(a.Inside(0).Namespace, a.Inside(0).Addr6, 6060), a.Socket(a.Outside.Namespace, lab.Peer6A, 6060)
			ext := a.Contact(phone, proxy)
			a.Stands(phone, proxy, ext)
			a.Arrives(phone, a.Socket(a.Outside.Namespace, lab.Peer6A, 6070), ext)
		},
	},
	"Docker on the gateway": {
		options: noRules, config: byMap + insideSubnet, set: loadsFirewall(lab.IPTablesNFT, "docker.iptables"), later: isDeaf, cured: hears,
	},
	"A daemon died, and something stays behind": {
		options: masqueraded, stopped: true,
		set: func(s *scene) {
			s.Serve()
			s.Kill()
		},
		cured: func(a *ailing) {
			if left := a.Leftovers(); len(left) > 0 {
				a.T.Errorf("it leaves %q", left)
			}
		},
	},
	"The conntrack table is full": {options: masqueraded}, // the table is that of the whole machine
}

// Each section of docs/troubleshooting.md is true: with its fault the commands print what the
// page shows, and what it says to do helps.
//
// Fails when a sentence of the program changes and the page does not, when a line to type is wrong
// or does not help, and when a section has no play.
func TestTroubleshooting(t *testing.T) {
	ownMode(t)
	page, err := docs.Read("../docs/troubleshooting.md")
	if err != nil {
		t.Fatal(err)
	}
	if len(page.Sections) != len(ailments) {
		t.Errorf("the page has %d sections, and %d are played", len(page.Sections), len(ailments))
	}
	for _, section := range page.Sections {
		t.Run(section, func(t *testing.T) {
			t.Parallel() // most of the time they wait
			play, known := ailments[section]
			if !known {
				t.Fatal("no play makes this fault")
			}
			a := &ailing{scene: newScene(t, play.options), config: filepath.Join(t.TempDir(), "conenatd.toml")}
			if play.config == "" {
				play.config = insideSubnet
			}
			a.write(play.config)
			if play.set != nil {
				play.set(a.scene)
			}
			if !play.stopped {
				a.Start("--config", a.config, "--reconcile=1s")
			}
			if play.later != nil {
				play.later(a)
			}
			for _, b := range page.In(section) {
				switch b.Lang {
				case "console":
					for _, c := range b.Commands() {
						a.prints(c)
					}
				case "toml":
					a.write(b.Text)
				case "sh":
					for _, c := range b.Commands() {
						a.shell(c.Text)
					}
				default:
					t.Errorf("line %d: no test reads a block of %q", b.Line, b.Lang)
				}
			}
			if play.cured != nil {
				play.cured(a)
			}
		})
	}
}

// write writes the configuration.
func (a *ailing) write(text string) {
	a.T.Helper()
	a.Must(os.WriteFile(a.config, []byte(text), 0o644))
}

// here is a command of the page as it runs in the lab.
func (a *ailing) here(text string) string {
	return strings.ReplaceAll(strings.TrimPrefix(text, "sudo "), installed, a.config)
}

// shell runs a line of the page in the gateway, unless it is for systemd.
func (a *ailing) shell(line string) {
	a.T.Helper()
	if line = a.here(line); !strings.HasPrefix(line, "systemctl ") && !strings.HasPrefix(line, "journalctl ") {
		a.runShell("conenatd", a.Exe, line)
	}
}

// prints waits until a command prints what the page shows; it may exit with an error.
func (a *ailing) prints(c docs.Command) {
	a.T.Helper()
	shown := strings.ReplaceAll(strings.Join(c.Output, "\n"), installed, a.config)
	want, args := pattern(shown), strings.Fields(a.here(c.Text))
	if args[0] != "conenatd" {
		a.T.Fatalf("line %d: %q prints nothing that this test knows", c.Line, c.Text)
	}
	for end := time.Now().Add(stage.Patience()); ; {
		out, _ := a.CLI(args[1:]...)
		if want.MatchString(unspaced(out) + "\n") {
			return
		}
		if time.Now().After(end) {
			a.T.Errorf("line %d: %s prints\n%s\nand the page shows\n%s", c.Line, c.Text, out, strings.Join(c.Output, "\n"))
			return
		}
	}
}

// pattern matches what a page shows of an output: a line of "..." stands for any lines, and
// within a line it stands for any text.
func pattern(shown string) *regexp.Regexp {
	var b strings.Builder
	for line := range strings.Lines(unspaced(shown)) {
		if line = strings.TrimSpace(line); line == "..." {
			b.WriteString(`(?:.*\n)*`)
			continue
		}
		b.WriteString(strings.ReplaceAll(regexp.QuoteMeta(line), `\.\.\.`, ".*") + `\n`)
	}
	return regexp.MustCompile(`^` + b.String() + `$`)
}
