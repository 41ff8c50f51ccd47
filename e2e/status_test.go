package e2e

import (
	"encoding/csv"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/ti-mo/conntrack"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A status request during a reconcile that reads many flows is answered between two pieces
// of the dump, and the reconcile goes on undisturbed.
//
// Fails when status uses the connection that the reconcile reads from.
func TestStatusDoesNotDisturbAReconcile(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	s.Must(s.Gateway.Do(func() error {
		c, err := conntrack.Dial(nil)
		if err != nil {
			return err
		}
		from, to := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
		for port := range uint16(8000) { // a piece has 1,024
			f := conntrack.NewFlow(unix.IPPROTO_UDP, conntrack.StatusConfirmed|conntrack.StatusAssured, from, to, 1024+port, 9, 600, 0)
			err = errors.Join(err, c.Create(f))
		}
		return errors.Join(err, c.Close())
	}))
	s.Start(stage.Flags(stage.Expect, "--reconcile=1s")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	for i := range uint64(3) { // which only a reconcile sees
		_, err := s.Gateway.Output("conntrack", "-F", "expect")
		s.Must(err)
		s.Until("a reconcile put it back", func() bool { return s.Status().Counters.Repaired["expectations"] > i })
	}
	if st := s.Status(); len(st.Counters.Failed) > 0 || st.Flows != 1 {
		t.Errorf("failed %v, %d flows", st.Counters.Failed, st.Flows)
	}
	s.Stands(phone, proxy, ext)
}

// verdict is the first line of "conenatd status".
func (s *scene) verdict() string {
	s.T.Helper()
	out, code := s.CLI("status")
	line, _, _ := strings.Cut(out, "\n")
	if code != 0 {
		s.T.Fatalf("exit %d: %s", code, out)
	}
	return line
}

// The firewall drops what peers send to one of two subnets.
//
// Fails when the verdict is for the whole gateway, and when it is not what packets show.
func TestVerdictIsForEachSubnet(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Guest: true, Rules: lab.Masquerade + `table inet filter {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "wan0" oifname "guest0" ct state != established drop
	}
}
`})
	s.Start("--subnet", lab.InsideNet.String(), "--subnet", lab.GuestNet.String(), "--reconcile=1s")
	const want = "works for 1 of 2 subnets: 10.47.12.0/24: your firewall drops the flows of peers into subnet 10.47.12.0/24"
	if got := s.verdict(); got != want {
		t.Errorf("%q, want %q", got, want)
	}
	proxy := s.PeerSocket(lab.PeerA, 5060)
	phone, guest := s.InsideSocket(0, 5060), s.Socket(s.Guest.Namespace, s.Guest.Addr, 5061)
	ext, guestExt := s.Contact(phone, proxy), s.Contact(guest, proxy)
	s.Stands(phone, proxy, ext)
	s.Stands(guest, proxy, guestExt)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Lost(guest, s.PeerSocket(lab.PeerA, 5071), guestExt, proxy)
	s.Must(s.NFT("flush chain inet filter forward"))
	s.Until("it works", func() bool { return s.verdict() == "works" })
	s.Arrives(guest, s.PeerSocket(lab.PeerA, 5072), guestExt)
}

// Fails when a filter is not applied, and when the columns of the CSV are not the values.
func TestListIsFiltered(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{Inside: 2})
	s.Serve()
	a, b := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerC, 5060)
	one, two := s.InsideSocket(0, 5060), s.InsideSocket(1, 5061)
	for _, in := range []*lab.Socket{one, two} {
		for _, peer := range []*lab.Socket{a, b} {
			s.Stands(in, peer, s.Contact(in, peer))
		}
	}
	for args, want := range map[string]int{
		"--csv": 4, "--csv --host 10.47.11.109": 2, "--csv --host 10.47.11.109 --peer 203.0.113.0/24": 1, "--csv --subnet 10.47.12.0/24": 0,
		"--csv --state standing": 4, "--csv --state refused": 0,
	} {
		out, code := s.CLI(append([]string{"list"}, strings.Fields(args)...)...)
		rows, err := csv.NewReader(strings.NewReader(out)).ReadAll()
		if code != 0 || err != nil || len(rows) != want+1 || rows[0][0] != "int" {
			t.Errorf("%s: exit %d, %v: %s", args, code, err, out)
		}
	}
	for _, args := range [][]string{{"--json"}, nil} {
		out, _ := s.CLI(append([]string{"list", "--peer", lab.PeerC.String(), "--host", "10.47.11.110"}, args...)...)
		if !strings.Contains(out, "10.47.11.110:5061") || strings.Contains(out, "10.47.11.109") || strings.Contains(out, lab.PeerA.String()) {
			t.Errorf("%q: %s", args, out)
		}
	}
	for args, want := range map[string]string{
		"--host 10.47.12.9":                    "10.47.12.9 is in no enabled subnet (10.47.11.0/24): enable its network",
		"--subnet 10.47.12.0/24":               "10.47.12.0/24 is in no enabled subnet",
		"--host 10.47.11.77":                   "",
		"--host 10.47.11.77 --state refused":   "",
		"--subnet 10.0.0.0/8 --peer 192.0.2.1": "",
	} {
		out, code := s.CLI(append([]string{"list"}, strings.Fields(args)...)...)
		if said := strings.Contains(out, "is in no"); code != 0 || said != (want != "") || !strings.Contains(out, want) {
			t.Errorf("%s: exit %d, %s", args, code, out)
		}
	}
	for args, want := range map[string]string{"--csv --json": "--csv: expected without --json", "--state up": `state "up"`, "--host x": `host "x"`} {
		if out, code := s.CLI(append([]string{"list"}, strings.Fields(args)...)...); code != 78 || !strings.Contains(out, want) {
			t.Errorf("%s: exit %d, %s", args, code, out)
		}
	}
}
