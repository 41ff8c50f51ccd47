package e2e

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// sipHelper are rules that attach the SIP helper of the kernel.
const sipHelper = `table ip h {
	ct helper sip-udp { type "sip" protocol udp; }
	ct helper sip-tcp { type "sip" protocol tcp; }
	chain p {
		type filter hook prerouting priority 0;
		iifname "lan0" udp dport 5060 ct helper set "sip-udp"
		iifname "lan0" tcp dport 5060 ct helper set "sip-tcp"
	}
}
`

// A sipCall is between a phone and a proxy on peer A. The kernel's SIP helper translates the
// addresses in their messages, and expects their media.
type sipCall struct {
	*scene
	transport          string // as in a Via header
	phone, media       *lab.Socket
	proxy, proxyMedia  *lab.Socket
	overTCP, acceptTCP net.Conn // nil with UDP
	seq                int
}

func newSIPCall(s *scene, transport string) *sipCall {
	s.T.Helper()
	return &sipCall{
		scene: s, transport: transport,
		phone: s.InsideSocket(0, 6010), media: s.InsideSocket(0, 7010),
		proxy: s.PeerSocket(lab.PeerA, 5060), proxyMedia: s.PeerSocket(lab.PeerA, 40010),
	}
}

// connect begins the connection of a call by TCP.
func (c *sipCall) connect() {
	c.T.Helper()
	if c.transport != "TCP" {
		return
	}
	var l net.Listener
	c.Must(c.Outside.Do(func() (err error) {
		l, err = net.Listen("tcp", c.proxy.Addr().String())
		return err
	}))
	defer l.Close()
	c.Must(c.Inside(0).Do(func() (err error) {
		d := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(c.phone.Addr()), Timeout: 5 * time.Second}
		c.overTCP, err = d.Dial("tcp", c.proxy.Addr().String())
		return err
	}))
	c.T.Cleanup(func() { c.overTCP.Close() })
	var err error
	c.acceptTCP, err = l.Accept()
	c.Must(err)
	c.T.Cleanup(func() { c.acceptTCP.Close() })
}

// message is a SIP message with a description of media.
func (c *sipCall) message(first, method string, from, media netip.AddrPort) string {
	body := fmt.Sprintf("v=0\r\no=- 1 1 IN IP4 %v\r\ns=-\r\nc=IN IP4 %v\r\nt=0 0\r\nm=audio %d RTP/AVP 0\r\n", media.Addr(), media.Addr(), media.Port())
	return fmt.Sprintf("%s\r\nVia: SIP/2.0/%s %v;branch=z9hG4bK%d\r\nFrom: <sip:1@203.0.113.5>;tag=a\r\nTo: <sip:2@203.0.113.5>;tag=b\r\n"+
		"Call-ID: 1@10.47.11.109\r\nCSeq: %d %s\r\nContact: <sip:1@%v>\r\nContent-Type: application/sdp\r\nContent-Length: %d\r\n\r\n%s",
		first, c.transport, from, c.seq, c.seq, method, from, len(body), body)
}

// pass sends a message in one direction, and returns it as it arrives, with its source.
func (c *sipCall) pass(text string, toProxy bool, ext netip.AddrPort) (string, netip.AddrPort, error) {
	if c.transport == "TCP" {
		from, to := c.overTCP, c.acceptTCP
		if !toProxy {
			from, to = to, from
		}
		buf := make([]byte, 4096)
		_, err := from.Write([]byte(text))
		err = errors.Join(err, to.SetReadDeadline(time.Now().Add(stage.Patience())))
		n, failed := to.Read(buf)
		return string(buf[:n]), netip.AddrPort{}, errors.Join(err, failed)
	}
	from, to, dst := c.phone, c.proxy, c.proxy.Addr()
	if !toProxy {
		from, to, dst = to, from, ext
	}
	if err := from.Send(dst, text); err != nil {
		return "", netip.AddrPort{}, err
	}
	return to.Recv(stage.Patience())
}

var sipMedia = regexp.MustCompile(`c=IN IP4 (\S+)[\s\S]*m=audio (\d+)`)

// invite sends an INVITE to the proxy, repeatedly as phones do, and gets the answer. It
// returns the outside endpoint of the media.
func (c *sipCall) invite() (media netip.AddrPort) {
	c.T.Helper()
	c.seq++
	for range 3 {
		text, ext, err := c.pass(c.message("INVITE sip:2@203.0.113.5 SIP/2.0", "INVITE", c.phone.Addr(), c.media.Addr()), true, netip.AddrPort{})
		if err != nil {
			c.T.Fatalf("the invitation is lost: %v\n%s", err, c.Dump())
		}
		m := sipMedia.FindStringSubmatch(text)
		if m == nil {
			c.T.Fatalf("message %q", text)
		}
		if got, want := m[1]+":"+m[2], netip.AddrPortFrom(c.Gateway.Addr, c.media.Addr().Port()).String(); got != want {
			c.T.Fatalf("the helper tells of media at %s, want %s\n%s", got, want, c.Dump())
		}
		media = netip.MustParseAddrPort(m[1] + ":" + m[2])
		answer := c.message("SIP/2.0 200 OK", "INVITE", c.proxy.Addr(), c.proxyMedia.Addr())
		if ext.IsValid() { // answer the endpoint that the INVITE came from
			answer = strings.Replace(answer, "Via: SIP/2.0/UDP "+c.proxy.Addr().String(), "Via: SIP/2.0/UDP "+ext.String(), 1)
		}
		if _, _, err := c.pass(answer, false, ext); err != nil {
			c.T.Fatalf("the answer is lost: %v\n%s", err, c.Dump())
		}
	}
	return media
}

// bye ends the call; the helper then forgets its media.
func (c *sipCall) bye() {
	c.T.Helper()
	c.seq++
	_, _, err := c.pass(c.message("BYE sip:2@203.0.113.5 SIP/2.0", "BYE", c.phone.Addr(), c.media.Addr()), true, netip.AddrPort{})
	c.Must(err)
}

// talk passes media both ways.
func (c *sipCall) talk(media netip.AddrPort) {
	c.T.Helper()
	const up = "media of the phone"
	c.Must(c.media.Send(c.proxyMedia.Addr(), up))
	if from, err := c.proxyMedia.Expect(up); err != nil || from != media {
		c.T.Fatalf("media from %v, want %v: %v", from, media, err)
	}
	c.Arrives(c.media, c.proxyMedia, media)
}

// The user's SIP helper works as without conenatd: repeated INVITEs in a call, and a second
// call with the same media endpoint.
//
// Fails when our expectation stands where the helper needs its own.
func TestSIPHelperOfTheUsersWorks(t *testing.T) {
	for _, transport := range []string{"UDP", "TCP"} {
		for _, mode := range [][]string{stage.Auto, stage.Expect, stage.NFT} {
			t.Run(transport+"/"+mode[0][len("--backend="):], func(t *testing.T) {
				s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + sipHelper}, append(mode, "--reconcile=1s")...)
				if mode[0] == stage.NFT[0] {
					s.Must(s.NFT("insert rule inet filter forward ct status dnat accept"))
				}
				c, other := newSIPCall(s, transport), s.PeerSocket(lab.PeerA, 41510)
				c.connect()
				for range 2 {
					for range 2 {
						media := c.invite()
						c.talk(media)
						// This packet uses up the helper's expectation, so now ours could be
						// made.
						c.Arrives(c.media, other, media)
						if mode[0] == stage.Expect[0] {
							if p := c.Listed(c.media, c.proxyMedia, media, "refused"); p.Reason != "helper" {
								t.Errorf("reason %q", p.Reason)
							}
						} else if p := c.Listed(c.media, c.proxyMedia, media, "standing"); p.Backend != "nft" {
							t.Errorf("it stands by %q", p.Backend)
						}
						for range 2 { // each reload reads what helpers expect
							s.readAgain()
						}
					}
					c.bye()
				}
			})
		}
	}
}
