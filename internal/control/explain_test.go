package control

import (
	"context"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"strings"
	"testing"
)

// Fails when an endpoint loses its port on the way, or an address gets one.
func TestExplainIsAskedAndAnswered(t *testing.T) {
	path, _ := start(t, source{full, these(nil)})
	for _, peer := range []string{"203.0.113.5", "203.0.113.5:5070", "2001:db8::5", "[2001:db8::5]:5070"} {
		to := map[bool]string{false: "198.51.100.1:5060", true: "[2001:db8::1]:5060"}[strings.Count(peer, ":") > 1]
		from, ext, err := ParsePacket(peer, to)
		if err != nil {
			t.Fatal(err)
		}
		x, err := Dial(path).Explain(t.Context(), from, ext)
		if err != nil || x.Peer != from.Addr() || x.PeerPort != from.Port() || x.Ext != ext || x.To != proxy.Int || len(x.Steps) != 2 {
			t.Errorf("%s: %+v, %v", peer, x, err)
		}
	}
}

// Fails when a wrong question is answered, or the error does not say what is wrong.
func TestWrongQuestionsAreRefused(t *testing.T) {
	path, _ := start(t, source{full, these(nil)})
	for query, want := range map[string]string{
		"":                                             `expected one parameter "peer"`,
		"peer=203.0.113.5":                             `expected one parameter "peer"`,
		"peer=a&ext=198.51.100.1:1":                    `peer "a": expected an address`,
		"peer=203.0.113.5:0&ext=1.2.3.4:1":             `peer "203.0.113.5:0"`,
		"peer=203.0.113.5&ext=198.51.100.1":            `outside endpoint "198.51.100.1": expected`,
		"peer=2001:db8::5&ext=1.2.3.4:1":               "both of IPv4, or both of IPv6",
		"peer=fe80::1%25wan0&ext=[2001:db8::1]:1":      `peer "fe80::1`,
		"peer=203.0.113.5&ext=1.2.3.4:1&x=":            "and no other",
		"peer=203.0.113.5&ext=1.2.3.4:1&ext=1.2.3.4:2": `one "ext"`,
	} {
		values, err := url.ParseQuery(query)
		if err != nil {
			t.Fatal(err)
		}
		_, err = fetch[Explanation](t.Context(), Dial(path), http.MethodGet, pathExplain+"?"+values.Encode())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", query, err, want)
		}
	}
}

// counting is a source that notes how many lists and explanations are under way during one.
type counting struct {
	source
	lists chan struct{}
	seen  *int
}

func (c counting) Explain(peer, ext netip.AddrPort) (Explanation, error) {
	*c.seen = len(c.lists)
	return c.source.Explain(peer, ext)
}

// An explanation walks all permissions, like a list.
//
// Fails when an explanation begins without a place of the lists, or keeps it.
func TestAnExplanationTakesThePlaceOfAList(t *testing.T) {
	var seen int
	lists := make(chan struct{}, 1)
	h := handler{counting{lists: lists, seen: &seen}, nil, lists}
	explain := func(ctx context.Context) int {
		query := url.Values{peerParameter: {"203.0.113.5"}, extParameter: {"198.51.100.1:5060"}}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, http.MethodGet, pathExplain+"?"+query.Encode(), nil))
		return w.Code
	}
	if code := explain(t.Context()); code != http.StatusOK || seen != 1 || len(lists) != 0 {
		t.Fatalf("status %d, %d under way, %d afterwards", code, seen, len(lists))
	}
	lists <- struct{}{} // another one is under way, and the daemon stops
	ctx, stop := context.WithCancel(t.Context())
	stop()
	if code := explain(ctx); code != http.StatusServiceUnavailable {
		t.Errorf("status %d while all places are taken", code)
	}
}

// Fails when the first line does not have the verdict and the endpoint.
func TestExplanationForPeople(t *testing.T) {
	x := Explanation{
		Peer: netip.MustParseAddr("203.0.113.5"), Ext: netip.MustParseAddrPort("198.51.100.1:5060"), Verdict: "arrives", To: proxy.Int,
		Steps: []Step{{"map", "matches", "it stands"}, {"firewall", "passes", "it is accepted"}},
	}
	for port, want := range map[uint16]string{
		0:    "from 203.0.113.5, any port without a flow, to 198.51.100.1:5060: ARRIVES at 10.47.11.109:5060\n",
		5070: "from 203.0.113.5:5070 to 198.51.100.1:5060: ARRIVES at 10.47.11.109:5060\n",
	} {
		x.PeerPort = port
		var b strings.Builder
		if err := WriteExplanation(&b, x); err != nil {
			t.Fatal(err)
		}
		if got := b.String(); got != want+"  map       matches  it stands\n  firewall  passes   it is accepted\n" {
			t.Errorf("%q", got)
		}
	}
	x.Verdict, x.To = "forwarded", netip.AddrPort{}
	var b strings.Builder
	if err := WriteExplanation(&b, x); err != nil || !strings.Contains(b.String(), "forwards it: an unknown host\n") {
		t.Errorf("%v: %q", err, b.String())
	}
}
