package e2e

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/docs"
	"github.com/conenatd/conenatd/internal/lab"
)

// A recipePlay is what a test must know about a page in addition to its text.
type recipePlay struct {
	page    string
	variant string // of iptables; empty means iptables-nft
	guest   bool   // the gateway has a second network
	// links makes the links that the page names. Without it there are lan0 and wan0.
	links func(s *scene)
	// forward is a port forward of the page that must keep working.
	forward *forwarded
	// from is the outside address of inside hosts, if it is not wan0's.
	from string
	// proxyPort is the port of the phone's proxy, if it differs from the phone's port.
	proxyPort uint16
	// needs shows what the page's line is for, if not to let answers arrive.
	needs func(r *recipe)
	// beforeMap removes rules that let children pass without the line for the map.
	beforeMap func(r *recipe)
	// also checks further promises of this page; the daemon runs with the page's
	// configuration.
	also func(r *recipe)
}

// A forwarded port leads to an inside host.
type forwarded struct {
	port   uint16
	peer   netip.Addr // who uses it
	host   func(s *scene) *lab.Host
	to     uint16 // the host's port
	byLine bool   // the firewall accepts it only with the page's line
}

// A recipe is a page that is played.
type recipe struct {
	*scene
	recipePlay
	docs.Page
	proxy *lab.Socket // with a port of its own
}

// Every page of docs/recipes is true: its rules load, and with its configuration and line
// a peer's answer from another port arrives. Packets from other addresses do not, port
// forwards and TCP still work, and status shows what the page says.
//
// Fails when a ruleset, a configuration, a line to add or a line of status on a page is
// wrong.
func TestRecipes(t *testing.T) {
	for _, play := range plays {
		t.Run(strings.TrimSuffix(play.page+"/"+play.variant, "/"), func(t *testing.T) {
			if play.variant == "" {
				play.variant = lab.IPTablesNFT
			}
			if play.from == "" {
				play.from = "198.51.100.1"
			}
			r := &recipe{recipePlay: play, Page: readPage(t, play.page)}
			r.scene = newScene(t, lab.Options{Inside: 2, Guest: r.guest, Rules: lab.NoRules})
			if r.links != nil {
				r.links(r.scene)
			}
			config := r.config()
			r.load(pageGateway)

			// Without conenatd, for comparison.
			r.loses(6070)
			r.forwards(false)
			r.tcp(8080)
			r.Must(r.Flush())

			r.Start("--config", config)
			if len(r.In(pageLine)) > 0 {
				r.lineToAdd(6080)
			}
			r.answers(6090)
			r.shows(pageStatus)
			r.forwards(len(r.In(pageLine)) > 0)
			r.tcp(8090)
			if r.also != nil {
				r.also(r)
			}
			r.Stop()

			if len(r.In(pageMapLine)) == 0 {
				return
			}
			if r.beforeMap != nil {
				r.beforeMap(r)
			}
			r.Start("--config", config, "--backend=nft")
			r.makesTheDifference(pageMapLine, 6100)
			r.answers(6110)
			r.Stop()
			r.Start("--config", config)
			r.answers(6120)
			r.shows(pageMapLine)
			r.forwards(true)
			r.Stop()
		})
	}
}

// contact lets the phone send to its proxy, and returns both and the outside endpoint.
func (r *recipe) contact(port uint16) (phone, proxy *lab.Socket, ext netip.AddrPort) {
	r.T.Helper()
	phone, proxy = r.InsideSocket(0, port), r.proxy
	switch {
	case r.proxyPort == 0:
		proxy = r.PeerSocket(lab.PeerA, port)
	case proxy == nil:
		proxy = r.PeerSocket(lab.PeerA, r.proxyPort)
		r.proxy = proxy
	}
	ext = r.Contact(phone, proxy)
	if !strings.Contains(r.from, ext.Addr().String()) {
		r.T.Fatalf("it leaves as %v, want from %s", ext, r.from)
	}
	return phone, proxy, ext
}

// loses shows that an answer from another port is lost.
func (r *recipe) loses(port uint16) {
	r.T.Helper()
	phone, proxy, ext := r.contact(port)
	r.Lost(phone, r.PeerSocket(lab.PeerA, port+1), ext, proxy)
}

// answers shows that the peer gets in from another port, and nobody else does.
func (r *recipe) answers(port uint16) {
	r.T.Helper()
	phone, proxy, ext := r.contact(port)
	r.Stands(phone, proxy, ext)
	media := r.PeerSocket(lab.PeerA, port+1)
	r.Arrives(phone, media, ext)
	r.Lost(phone, r.PeerSocket(stranger, port+1), ext, proxy)
	r.replies(phone, media, ext)
}

// replies shows that the phone's reply to a child comes from its outside endpoint.
func (r *recipe) replies(phone, media *lab.Socket, ext netip.AddrPort) {
	r.T.Helper()
	reply := stage.Payload("reply to child")
	r.Must(phone.Send(media.Addr(), reply))
	from, err := media.Expect(reply)
	r.Must(err)
	if from != ext {
		r.T.Errorf("the reply to a child comes from %v, want %v", from, ext)
	}
}

// lineToAdd shows what the page's line is for, and loads it. Before that, status must
// show what that section says.
func (r *recipe) lineToAdd(port uint16) {
	r.T.Helper()
	r.shows(pageLine)
	if r.needs != nil {
		r.needs(r)
		return
	}
	r.makesTheDifference(pageLine, port)
}

// makesTheDifference shows that an answer is lost without the line of a section, and
// arrives with it.
func (r *recipe) makesTheDifference(section string, port uint16) {
	r.T.Helper()
	phone, proxy, ext := r.contact(port)
	r.Stands(phone, proxy, ext)
	media := r.PeerSocket(lab.PeerA, port+1)
	r.Lost(phone, media, ext, proxy)
	r.load(section)
	r.Must(lab.Arrives(phone, lab.Packet{From: media, To: ext, Payload: stage.Payload("with the line")}))
}

// forwards shows that a port forward works; line says whether the page's line is loaded.
func (r *recipe) forwards(line bool) {
	r.T.Helper()
	f := r.forward
	if f == nil || f.byLine && !line {
		return
	}
	h := f.host(r.scene)
	server := r.Socket(h.Namespace, h.Addr, f.to)
	defer server.Close()
	client := r.PeerSocket(f.peer, 0)
	defer client.Close()
	p := stage.Payload("to the forwarded port")
	to := netip.AddrPortFrom(netip.MustParseAddr(strings.Fields(r.from)[0]), f.port)
	r.Must(client.Send(to, p))
	if _, err := server.Expect(p); err != nil {
		r.T.Fatalf("forwarded port %d: %v\n%s", f.port, err, r.Dump())
	}
}

// tcp shows that an inside host reaches a peer by TCP.
func (r *recipe) tcp(port uint16) {
	r.T.Helper()
	var server net.Listener
	r.Must(r.Outside.Do(func() (err error) {
		server, err = net.Listen("tcp", netip.AddrPortFrom(lab.PeerA, port).String())
		return err
	}))
	defer server.Close()
	go func() {
		if c, err := server.Accept(); err == nil {
			fmt.Fprint(c, c.RemoteAddr())
			c.Close()
		}
	}()
	var client net.Conn
	r.Must(r.Inside(0).Do(func() (err error) {
		client, err = net.DialTimeout("tcp", server.Addr().String(), stage.Patience())
		return err
	}))
	defer client.Close()
	r.Must(client.SetDeadline(time.Now().Add(stage.Patience())))
	seen, err := io.ReadAll(client)
	r.Must(err)
	from, err := netip.ParseAddrPort(string(seen))
	r.Must(err)
	if !strings.Contains(r.from, from.Addr().String()) {
		r.T.Errorf("TCP leaves as %v, want from %s", from, r.from)
	}
}
