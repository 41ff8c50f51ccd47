package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/lab"
)

// connect opens a TCP connection to the gateway.
func (p *patient) connect(from netip.Addr, port uint16) error {
	return p.Outside.Do(func() error {
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: from.AsSlice()}, Timeout: stage.Patience()}
		c, err := d.DialContext(p.T.Context(), "tcp", netip.AddrPortFrom(p.Gateway.Addr, port).String())
		if err == nil {
			err = c.Close()
		}
		return err
	})
}

// The forward chain opens port forwards to one source alone. nftables can tell children from
// forwards, so a forward for UDP stays closed, too.
//
// Fails when the line that doctor prints for children opens a forward that the user restricts.
func TestDoctorsLinesLeaveForwardsClosed(t *testing.T) {
	const restricted = `table ip forwards { chain prerouting { type nat hook prerouting priority dstnat; iifname "wan0" meta l4proto { tcp, udp } th dport 5432 dnat to 10.47.11.109; }; }
table inet filter {
	chain forward {
		type filter hook forward priority filter; policy drop;
		ct state established accept
		iifname "lan0" accept
		meta l4proto { tcp, udp } th dport 5432 ip saddr 203.0.113.5 accept
		tcp dport 5432 reject with tcp reset
	}
}
`
	const docker = `*nat
-A PREROUTING -i wan0 -p tcp --dport 5432 -j DNAT --to-destination 10.47.11.109
-A POSTROUTING -o wan0 -j MASQUERADE
COMMIT
*filter
:FORWARD DROP
:DOCKER-USER -
-A FORWARD -j DOCKER-USER
-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT
-A FORWARD -i lan0 -j ACCEPT
-A FORWARD -i wan0 -p tcp --dport 5432 -j ACCEPT
-A DOCKER-USER -i wan0 -p tcp --dport 5432 ! -s 203.0.113.5 -j REJECT --reject-with tcp-reset
-A DOCKER-USER -j RETURN
COMMIT
`
	for name, tt := range map[string]struct {
		options lab.Options
		set     func(s *scene)
		backend string
		udp     bool // there is a forward for UDP, which has to stay closed
	}{
		"nft":                    {lab.Options{Rules: lab.Masquerade + restricted}, func(*scene) {}, "nft", true},
		"nft, expectations only": {lab.Options{Rules: lab.Masquerade + restricted}, func(*scene) {}, "expect", false},
		"Docker":                 {noRules, loads(lab.IPTablesNFT, docker), "nft", false},
	} {
		t.Run(name, func(t *testing.T) {
			ownMode(t)
			p := &patient{newScene(t, tt.options), fault{id: dropped, top: fmt.Sprintf("backend = %q\n", tt.backend)}, filepath.Join(t.TempDir(), "conenatd.toml")}
			tt.set(p.scene)
			var server net.Listener
			p.Must(p.Inside(0).Do(func() (err error) {
				server, err = net.Listen("tcp", netip.AddrPortFrom(p.Inside(0).Addr, 5432).String())
				return err
			}))
			defer server.Close()
			forwarded := p.InsideSocket(0, 5432)
			p.write()
			p.Start("--config", p.config)
			closed := func() {
				t.Helper()
				if err := p.connect(lab.PeerA, 5432); err != nil {
					t.Errorf("the forward is closed to whom it is for: %v", err)
				}
				if err := p.connect(lab.PeerC, 5432); !errors.Is(err, unix.ECONNREFUSED) {
					t.Errorf("the forward is open to everybody: %v", err)
				}
				if tt.udp {
					at := netip.AddrPortFrom(p.Gateway.Addr, 5432)
					p.Lost(forwarded, p.Socket(p.Outside.Namespace, lab.PeerC, 0), at, p.Socket(p.Outside.Namespace, lab.PeerA, 0))
				}
			}
			closed()
			p.reaches(6000, false)
			var f *doctor.Finding
			p.Until("doctor finds it", func() bool { f = p.finding(); return f != nil })
			p.apply(f.Fix)
			p.Until("the fault is gone", func() bool {
				return !slices.ContainsFunc(p.doctor().Findings, func(f doctor.Finding) bool { return f.ID == dropped })
			})
			p.reaches(6010, true)
			closed()
		})
	}
}
