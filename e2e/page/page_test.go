// Package page tests the page for people in a real browser.
package page

import (
	"flag"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/chromedp/chromedp"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

var update = flag.Bool("update", false, "write docs/page.png")

const (
	addr = "127.0.0.1:9469"
	url  = "http://" + addr + "/"
)

func TestMain(m *testing.M) { stage.Main(m) }

// Real packets appear on the page as they do in "conenatd list" and "watch".
//
// Fails when the verdict, a counter, a permission or an event is missing, when search finds
// too much or too little, and when the browser has anything to complain about: a script, the
// policy, a file that is not there.
func TestPageShowsWhatHappens(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 2})
	b := open(t, s.Gateway.Namespace)
	s.Serve("--reconcile=1s", "--metrics-listen="+addr)
	complaints := b.console()
	b.do(chromedp.Navigate(url))
	b.shows(s, "#verdict", "works")
	b.shows(s, "#found", "0 of 0 permissions")
	b.shows(s, "#events", "watching")

	phone, console := s.InsideSocket(0, 5060), s.InsideSocket(1, 3074)
	proxy, game := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 3074)
	ext := s.Contact(phone, proxy)
	s.Contact(console, game)
	b.shows(s, "#events", "granted", ext.String()+" <- "+lab.PeerA.String(), phone.Addr().String())
	media := s.PeerSocket(lab.PeerA, 5070)
	s.Arrives(phone, media, ext)
	b.shows(s, "#events", "child", ext.String()+" <- "+media.Addr().String())
	b.shows(s, "#found", "2 of 2 permissions")
	b.shows(s, "#rows", phone.Addr().String(), console.Addr().String(), "standing")
	b.shows(s, "#path", "standing\n2", "granted\n2", "admitted by", "children passed\n1")
	b.shows(s, "#verdict", "works")

	b.search("  " + console.Addr().Addr().String() + " STAND")
	b.shows(s, "#found", "1 of 2 permissions")
	b.shows(s, "#announce", "1 of 2 permissions")
	if rows := b.text("#rows tr"); !strings.HasPrefix(rows, console.Addr().String()) || strings.Contains(rows, phone.Addr().String()) {
		t.Errorf("found %q", rows)
	}
	b.search(netip.PrefixFrom(lab.PeerA, 31).Masked().String())
	b.shows(s, "#rows", lab.PeerA.String())
	b.search("refused")
	b.shows(s, "#found", "0 of 2 permissions")
	b.search("10.47.11.")
	b.shows(s, "#found", "2 of 2 permissions")

	for _, scheme := range []string{"dark", "light"} {
		b.look(360, 800, scheme)
		if wide := eval[int](b, "document.documentElement.scrollWidth"); wide > 360 {
			t.Errorf("%s: the page has %d columns of pixels on a screen of 360", scheme, wide)
		}
	}
	if *update {
		b.look(1000, 850, "light")
		b.search(" ")
		eval[chromedp.Void](b, `document.activeElement.blur()`)
		png, err := chromedp.Run(b.ctx, chromedp.FullScreenshot(100))
		s.Must(err)
		s.Must(os.WriteFile("../../docs/page.png", png, 0o644))
	}
	if all := complaints(); len(all) > 0 {
		t.Errorf("the browser complains: %q", all)
	}
}

// The names of links are the user's. So is what is in the text of findings.
//
// Fails when text from the daemon becomes an element of the page.
func TestPageShowsMarkupAsText(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 1, Rules: "table ip nat { chain post { type nat hook postrouting priority srcnat; masquerade; }; }"})
	b := open(t, s.Gateway.Namespace)
	const link = "<img>"
	s.AddLink(link, "10.99.0.1")
	s.IP(s.Gateway, "route add 10.99.0.0/24 dev "+link)
	s.Serve("--metrics-listen=" + addr)
	b.do(chromedp.Navigate(url))
	s.Must(s.InsideSocket(0, 5060).Send(netip.MustParseAddrPort("10.99.0.2:5060"), stage.Payload("to another link")))
	b.shows(s, "#path", "peer is behind "+link)
	if n := eval[int](b, `document.querySelectorAll("img").length`); n != 0 {
		t.Errorf("%d images", n)
	}
}

// Fails when a name, another origin or a frame gets at the page.
func TestPageIsForItselfAlone(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 1})
	b := open(t, s.Gateway.Namespace)
	s.Serve("--metrics-listen=" + addr)
	answer, err := chromedp.RunResponse(b.ctx, chromedp.Navigate("http://gateway.example:9469/"))
	s.Must(err)
	if text := b.text("body"); answer.Status != 403 || !strings.Contains(text, `host "gateway.example:9469"`) {
		t.Errorf("status %d, %q", answer.Status, text)
	}
	// A page of another origin: the refusal itself is one.
	for _, path := range []string{"", "page.js", "state", "events"} {
		for _, mode := range []string{"cors", "no-cors"} {
			script := fmt.Sprintf(`fetch(%q, {mode: %q}).then((r) => "status " + r.status + ", " + r.type, () => "nothing")`, url+path, mode)
			got, err := chromedp.Run(b.ctx, chromedp.Evaluate[string](script, chromedp.EvalAwaitPromise))
			s.Must(err)
			if got != "nothing" {
				t.Errorf("/%s, %s: %s", path, mode, got)
			}
		}
	}
}

// Fails when the page shows addresses to other machines that nobody allowed to see them, when
// those that may see it cannot, and when metrics go with it.
func TestPageOnAnAddressOfTheGateway(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 1})
	// The gateway's address on the inside link, as a browser on an inside host asks for it.
	at := "10.47.11.1:9469"
	b := open(t, s.Inside(0).Namespace)
	for mode, want := range map[string]string{"loopback": "served on loopback addresses only", "off": "404 page not found", "everywhere": "Packet path"} {
		s.Serve("--metrics-listen="+at, "--page="+mode)
		b.do(chromedp.Navigate("http://" + at + "/"))
		b.shows(s, "body", want)
		if mode == "everywhere" {
			b.shows(s, "#verdict", "works")
		}
		b.do(chromedp.Navigate("http://" + at + "/metrics"))
		b.shows(s, "body", "conenatd_build_info")
		s.Stop()
	}
}

// Fails when a finding of the status is missing or stays, when old values look current after the
// end of the daemon, and when the page does not find the next daemon.
func TestPageShowsWhatIsWrong(t *testing.T) {
	s := stage.New(t, lab.Options{Inside: 1, Rules: lab.Masquerade + lab.DropPolicy})
	b := open(t, s.Gateway.Namespace)
	flags := []string{"--backend=nft", "--reconcile=1s", "--metrics-listen=" + addr}
	s.Serve(flags...)
	b.do(chromedp.Navigate(url))
	b.shows(s, "#verdict", "does not work: ")
	for _, f := range s.Status().Findings {
		b.shows(s, "#findings", f.Text, f.Fix)
	}
	s.Stop()
	b.shows(s, "#trouble", "what you see is old")
	s.Must(s.NFT("delete table inet filter\n"))
	s.Serve(flags...)
	s.Until("the page shows the next daemon", func() bool { return b.text("#trouble") == "" && b.text("#verdict") == "works" })
	if left := b.text("#findings"); left != "" {
		t.Errorf("findings: %q", left)
	}
}
