package e2e

import (
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/lab"
)

// smallTag selects the small build.
const smallTag = "conenatd_small"

// Fails when the small build does not let a peer answer, when it starts although it cannot do
// what it was told to, or does not say why, and when something is left in the kernel then.
func TestSmallBuild(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.Exe = stage.Build(t, smallTag)
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{append([]string{"run"}, stage.Flags(nil, "--metrics-listen=127.0.0.1:9469")...), config.UsageStatus, "conenatd: metrics_listen: this is the small build, which has neither metrics nor the page: "},
		{[]string{"probe", "--server", "203.0.113.1"}, 1, "conenatd: this is the small build, which has no probe: "},
		{[]string{"top", "--interval=1s"}, 1, "conenatd: this is the small build, which has no top: "},
	} {
		out, code := s.CLI(c.args...)
		if code != c.code || !strings.HasPrefix(out, c.want) || strings.Count(out, "\n") != 1 {
			t.Errorf("%q: %q, exit status %d", c.args, out, code)
		}
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("left in the kernel: %q", left)
	}

	s.Serve()
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
	if out, code := s.CLI("status"); code != 0 || !strings.HasPrefix(out, "works\n") {
		t.Errorf("status: %q, exit status %d", out, code)
	}
}

// Fails when the small build has a package that it is there to leave out, under whatever
// name it comes in.
func TestSmallBuildLeavesOut(t *testing.T) {
	const of = "github.com/conenatd/conenatd/"
	unwanted := []string{of + "internal/metrics", of + "internal/page", of + "internal/probe", of + "internal/top", "github.com/gdamore/tcell/v3", "github.com/prometheus/client_golang/prometheus", "github.com/pion/stun/v3"}
	for _, tags := range []string{"", smallTag} {
		out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-json=ImportPath", "-tags="+tags, of+"cmd/conenatd").Output()
		if err != nil {
			t.Fatal(err)
		}
		var all []string
		for d := json.NewDecoder(strings.NewReader(string(out))); d.More(); {
			var p struct{ ImportPath string }
			if err := d.Decode(&p); err != nil {
				t.Fatal(err)
			}
			all = append(all, p.ImportPath)
		}
		for _, p := range unwanted {
			if has := slices.Contains(all, p); has == (tags == smallTag) {
				t.Errorf("with tags %q the program has %s: %v", tags, p, has)
			}
		}
	}
}
