package e2e

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

func TestNFTStopLeavesNothing(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto, stage.AutoByEvent}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5071)
		ext := s.Contact(phone, proxy)
		rules, err := s.Ruleset()
		s.Must(err)
		table := s.table()
		s.Start(stage.Flags(mode)...)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext) // a child that nobody answers
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_events", "0"))
		s.Arrives(phone, media, ext) // a child that no event reported
		s.Stop()
		if got := s.table(); !slices.Equal(got, table) {
			t.Errorf("conntrack table\nbefore %q\nafter  %q", table, got)
		}
		if got, err := s.Ruleset(); err != nil || got != rules {
			t.Errorf("rule set changed: %v\n%s", err, got)
		}
	})
}

// A child that the inside host answered goes on when its permission ends with the
// daemon, like any other flow.
func TestNFTStopLeavesAnsweredChildren(t *testing.T) {
	stage.InModes(t, [][]string{stage.NFT, stage.Auto}, func(t *testing.T, mode ...string) {
		s := play(t, lab.Options{}, mode...)
		phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, media, ext)
		p := stage.Payload("answer")
		s.Must(phone.Send(media.Addr(), p))
		_, err := media.Expect(p)
		s.Must(err)
		s.Stop()
		s.Arrives(phone, media, ext)
		s.Lost(phone, s.PeerSocket(lab.PeerA, 5071), ext, media)
	})
}

func TestNFTStopThatKeepsLeavesTheTables(t *testing.T) {
	t.Parallel() // mostly it waits
	stage.InModes(t, [][]string{stage.NFT, stage.NFTByEvent, stage.Auto}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{})
		args := stage.Flags(mode, "--on-stop=keep", "--max-children=0")
		s.Start(args...)
		phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		before := s.tables()
		fresh := s.Steady(s.FreshPorts(phone, lab.PeerA, ext))
		s.Stop()
		if after := s.tables(); len(before) != 2 || !slices.Equal(after, before) {
			t.Errorf("tables %q, were %q", after, before)
		}
		if !s.inMap(entryOf(phone, proxy, ext)) {
			t.Errorf("the map has %v", s.entries())
		}
		s.Start(args...)
		t.Logf("the first packets of %d children arrived meanwhile", fresh())
		if n := s.Status().Counters.Granted; n != 0 {
			t.Errorf("%d permissions were granted anew, want all taken over", n)
		}
		s.Stop()
		s.Start(stage.Flags(mode)...)
		s.Stop()
		if left := s.tables(); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
		if left := append(s.ConntrackList("expect"), s.Anchors()...); len(left) > 0 {
			t.Errorf("left: %q", left)
		}
	})
}

func TestNFTForeignTableIsLeftAloneAndNamed(t *testing.T) {
	s := newScene(t, lab.Options{Rules: lab.Masquerade + "table ip conenat {\n\tmap permissions {\n\t\ttype ipv4_addr : ipv4_addr\n\t}\n}\n"})
	before, err := s.Ruleset()
	s.Must(err)
	for _, mode := range [][]string{stage.NFT, stage.Auto, stage.Expect} {
		args := slices.Concat([]string{"run"}, stage.Flags(mode, "--control-socket", filepath.Join(t.TempDir(), "c.sock")))
		out, code := s.CLI(args...)
		if code != 1 || !strings.Contains(out, "table ip conenat") || !strings.Contains(out, `key "table"`) {
			t.Errorf("%v: exit %d, %q", mode, code, out)
		}
	}
	s.Start(stage.Flags(stage.NFT, "--table=conenat2")...)
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	s.Stop()
	if after, err := s.Ruleset(); err != nil || after != before {
		t.Errorf("the rule set is %v\n%s\nnot\n%s", err, after, before)
	}
}
