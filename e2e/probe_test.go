package e2e

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os/exec"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/probe"
)

// twoAddresses are those of the STUN server.
var twoAddresses = []netip.Addr{lab.PeerA, lab.PeerC}

// probe runs "conenatd probe --json" on the inside host as a user without privileges, and
// checks the exit status.
func (s *scene) probe(args ...string) probe.Report {
	s.T.Helper()
	c := s.Inside(0).Command(s.T.Context(), s.ForAll(), append([]string{"probe", "--json"}, args...)...)
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	out, err := c.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		s.T.Fatal(err)
	}
	var r probe.Report
	if err := json.Unmarshal(out, &r); err != nil || c.ProcessState.ExitCode() != r.Status() || len(r.Results) == 0 {
		s.T.Fatalf("exit %d, %v: %s", c.ProcessState.ExitCode(), err, out)
	}
	return r
}

// behaviour is the part of a probe.Result that tests compare.
type behaviour struct {
	mapping, filtering string
	hairpin            probe.Hairpin
	verdict            probe.Verdict
	status             int
}

func behaviourOf(r probe.Report) behaviour {
	one := r.Results[0]
	return behaviour{one.Mapping, one.Filtering, one.Hairpin, one.Verdict, r.Status()}
}

var (
	stock      = behaviour{probe.EndpointIndependent, probe.AddressAndPortDependent, probe.HairpinNo, probe.PortRestrictedCone, 1}
	restricted = behaviour{probe.EndpointIndependent, probe.AddressDependent, probe.HairpinNo, probe.RestrictedCone, 0}
	fullCone   = behaviour{probe.EndpointIndependent, probe.EndpointIndependent, probe.HairpinNo, probe.FullCone, 0}
	symmetric  = behaviour{probe.AddressAndPortDependent, probe.AddressAndPortDependent, probe.HairpinNo, probe.Symmetric, 2}
)

func with(b behaviour, hairpin probe.Hairpin) behaviour {
	b.hairpin = hairpin
	return b
}

// Fails when probe misjudges a NAT that exists, with a real server.
func TestProbeTellsNATsApart(t *testing.T) {
	stage.OfTheDaemon(t)
	random := strings.Replace(lab.Masquerade, "masquerade", "masquerade fully-random", 1)
	const noNAT, full = "table ip nat {\n\tchain p { type nat hook postrouting priority srcnat; }\n}\n", "--filtering=endpoint_independent"
	notTranslated := func(filtering string, v probe.Verdict, status int) behaviour {
		return behaviour{probe.NotTranslated, filtering, probe.HairpinNone, v, status}
	}
	for name, tc := range map[string]struct {
		rules    string
		conenatd []string // flags, if it runs
		want     behaviour
	}{
		"stock":                      {lab.Masquerade, nil, stock},
		"stock, drop policy":         {lab.Masquerade + lab.DropPolicy, nil, stock},
		"conenatd":                   {lab.Masquerade, stage.Auto, restricted},
		"conenatd, drop policy":      {lab.Masquerade + lab.DropPolicy, stage.Auto, restricted},
		"conenatd, full cone":        {lab.Masquerade, append(stage.NFT, full), fullCone},
		"conenatd, hairpin":          {lab.Masquerade, append(stage.NFT, mapped, "--hairpin=true"), with(restricted, probe.HairpinYes)},
		"conenatd, full and hairpin": {lab.Masquerade, append(stage.NFT, mapped, "--hairpin=true", full), with(fullCone, probe.HairpinYes)},
		"random":                     {random, nil, symmetric},
		"random, conenatd's mapping": {random, append(stage.NFT, mapped), restricted},
		"no NAT":                     {noNAT, nil, notTranslated(probe.EndpointIndependent, probe.Open, 0)},
		"no NAT, drop policy":        {noNAT + lab.DropPolicy, nil, notTranslated(probe.AddressAndPortDependent, probe.SymmetricFirewall, 1)},
		"no NAT, conenatd": {
			noNAT + lab.DropPolicy, append(stage.Expect, "--routed"), notTranslated(probe.AddressDependent, probe.RestrictedFirewall, 0),
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // silence takes seconds
			s := newScene(t, lab.Options{Rules: tc.rules})
			if strings.Contains(name, "no NAT") {
				_, err := s.Outside.Output("ip", "route", "add", lab.InsideNet.String(), "via", "198.51.100.1")
				s.Must(err)
			}
			// With 1 a hairpinned packet to another port of its own host would be bridged, and a
			// bridge sends nothing back by the port that it came from.
			s.Must(s.Gateway.SetSysctl("net.bridge.bridge-nf-call-iptables", "0"))
			s.coturn(twoAddresses)
			if tc.conenatd != nil {
				s.Start(stage.Flags(tc.conenatd)...)
			}
			r := s.probe("--server", lab.PeerA.String())
			if got := behaviourOf(r); got != tc.want {
				t.Errorf("got %+v\nwant %+v\n%+v\n%s", got, tc.want, r, s.Dump())
			}
			one := r.Results[0]
			outside := s.Gateway.Addr.String()
			if tc.want.mapping == probe.NotTranslated {
				outside = one.Inside
			}
			if one.Server != "203.0.113.5:3478" || one.Other != "192.0.2.77:3479" || one.Inside != "10.47.11.109" ||
				!slices.Equal(one.Outside, []string{outside}) || len(one.Notes) > 0 {
				t.Errorf("%+v", one)
			}
		})
	}
}

// Fails when probe takes a server's silence for a filter, or does not say what it cannot know.
func TestProbeKnowsTheLimitsOfItsServer(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, tc := range map[string]struct {
		server func(s *scene)
		want   behaviour
		note   string // identifier
		what   string
	}{
		"nothing there": {func(*scene) {}, behaviour{probe.Unknown, probe.Unknown, probe.HairpinUnknown, probe.NoAnswer, 3}, "", "no program there has this UDP port open"},
		"rejected on the way": {
			func(s *scene) {
				s.coturn(twoAddresses)
				s.Must(s.NFT("table ip f {\n\tchain c {\n\t\ttype filter hook forward priority 0;\n\t\tudp dport 3478 reject with icmp admin-prohibited\n\t}\n}\n"))
			},
			behaviour{probe.Unknown, probe.Unknown, probe.HairpinUnknown, probe.NoAnswer, 3},
			"", "on the way rejects the packets (ICMP)",
		},
		"refused by this host": {
			func(s *scene) {
				s.drops(s.Inside(0), "output", "udp dport 3478")
			},
			behaviour{probe.Unknown, probe.Unknown, probe.HairpinUnknown, probe.NoAnswer, 3},
			"", "own firewall",
		},
		"no route": {
			func(s *scene) {
				_, err := s.Inside(0).Output("ip", "route", "del", "default")
				s.Must(err)
			},
			behaviour{probe.Unknown, probe.Unknown, probe.HairpinUnknown, probe.NoAnswer, 3},
			"", "no route",
		},
		"silent": {
			func(s *scene) { s.PeerSocket(lab.PeerA, 3478) },
			behaviour{probe.Unknown, probe.Unknown, probe.HairpinUnknown, probe.NoAnswer, 3},
			"", "UDP to it is blocked",
		},
		"no other address": {
			func(s *scene) { s.coturn(twoAddresses, "--no-rfc5780") },
			behaviour{probe.Unknown, probe.Unknown, probe.HairpinNo, probe.Undecided, 1},
			"no_other_address", "the notes",
		},
		"other address is down": {
			func(s *scene) {
				s.coturn(twoAddresses)
				s.drops(s.Outside, "input", "udp dport 3478-3479 ip daddr 192.0.2.77")
			},
			behaviour{probe.Unknown, probe.AddressAndPortDependent, probe.HairpinNo, probe.Undecided, 1},
			"other_address_silent", "the notes",
		},
		"it does not answer from elsewhere": {
			func(s *scene) {
				s.coturn(twoAddresses)
				s.drops(s.Outside, "input", "udp length 36") // requests with CHANGE-REQUEST
			},
			behaviour{probe.EndpointIndependent, probe.Unknown, probe.HairpinNo, probe.Undecided, 1},
			"filtering_unproven", "the notes",
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{})
			tc.server(s)
			r := s.probe("--server", lab.PeerA.String()+":3478")
			one := r.Results[0]
			if got := behaviourOf(r); got != tc.want || !strings.Contains(one.What, tc.what) {
				t.Errorf("got %+v\nwant %+v\n%+v", got, tc.want, r)
			}
			if tc.note == "" != (len(one.Notes) == 0) || tc.note != "" && one.Notes[0].ID != tc.note {
				t.Errorf("notes %+v, want %q", one.Notes, tc.note)
			}
		})
	}
}

// Fails when another address of the host than the chosen one is tested.
func TestProbeFromOneOfSeveralAddresses(t *testing.T) {
	stage.OfTheDaemon(t)
	t.Parallel()
	s := newScene(t, lab.Options{Rules: lab.Masquerade + "table ip second {\n\tchain c {\n\t\ttype nat hook postrouting priority srcnat - 1;\n" +
		"\t\toifname \"wan0\" ip saddr 10.47.11.200 meta l4proto udp snat to 198.51.100.1:50000-50999\n\t}\n}\n"})
	_, err := s.Inside(0).Output("ip", "address", "add", "10.47.11.200/24", "dev", "eth0")
	s.Must(err)
	s.coturn(twoAddresses)
	for from, preserved := range map[string]bool{"10.47.11.200": false, "10.47.11.109": true} {
		one := s.probe("--server", lab.PeerA.String(), "--from", from).Results[0]
		if one.Inside != from || one.PortPreserved != preserved || one.Verdict != probe.PortRestrictedCone {
			t.Errorf("from %s: %+v", from, one)
		}
	}
}

// Fails when the lifetime of a flow is not that of conntrack, or with conenatd not that of its
// permission, or when it is said of a server that cannot tell.
func TestProbeFindsTheLifetime(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, tc := range map[string]struct {
		timeout string // of conntrack, seconds
		server  []string
		daemon  bool
		want    *probe.Lifetime
	}{
		"longer":            {"60", nil, false, &probe.Lifetime{AtLeast: 8}},
		"shorter":           {"5", nil, false, &probe.Lifetime{LessThan: 8}},
		"shorter, conenatd": {"5", nil, true, &probe.Lifetime{AtLeast: 8}},
		"unknown":           {"60", []string{"--no-rfc5780"}, false, nil},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{})
			s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", tc.timeout))
			s.coturn(twoAddresses, tc.server...)
			if tc.daemon {
				s.Serve()
			}
			one := s.probe("--server", lab.PeerA.String(), "--lifetime=8s").Results[0]
			noted := slices.ContainsFunc(one.Notes, func(n probe.Note) bool { return n.ID == "no_response_port" })
			if !reflect.DeepEqual(one.Lifetime, tc.want) || noted != (tc.want == nil) {
				t.Errorf("%+v, want %+v; notes %+v", one.Lifetime, tc.want, one.Notes)
			}
		})
	}
}

// Fails when IPv6 is not tested, or as if it were translated.
func TestProbeOfIPv6(t *testing.T) {
	stage.OfTheDaemon(t)
	t.Parallel()
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.coturn([]netip.Addr{lab.Peer6A, lab.Peer6B})
	one := s.probe("--server", lab.Peer6A.String()).Results[0]
	if one.Family != "ipv6" || one.Verdict != probe.SymmetricFirewall || one.Hairpin != probe.HairpinNone ||
		!slices.Equal(one.Outside, []string{s.Inside(0).Addr6.String()}) {
		t.Errorf("%+v", one)
	}
}

// Fails when a wrong command line is not refused with one sentence before anything is sent.
func TestProbeRefusesAWrongCommandLine(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	for want, args := range map[string][]string{
		"--server: expected a STUN server with two addresses":     nil,
		`server "a:b": expected a port from 1 to 65535`:           {"--server=a:b"},
		`server "::1:": expected HOST, HOST:PORT`:                 {"--server=::1:"},
		`from "192.0.2.1": expected an address of this host`:      {"--server=203.0.113.5", "--from=192.0.2.1"},
		`server "224.0.0.1": expected the address of one host`:    {"--server=224.0.0.1"},
		"lifetime 1ms: expected a time from 1s to 10m":            {"--server=203.0.113.5", "--lifetime=1ms"},
		"lifetime 11m0s: expected a time from 1s to 10m":          {"--server=203.0.113.5", "--lifetime=11m"},
		`probe: expected no argument, got "203.0.113.5"`:          {"203.0.113.5"},
		"find server ::1: it has no address of the family of 198": {"--server=::1", "--from=198.51.100.1"},
	} {
		out, code := s.CLI(append([]string{"probe"}, args...)...)
		if !strings.Contains(out, want) || strings.Count(out, "\n") != 1 || code != 78 && !strings.Contains(want, "find") {
			t.Errorf("%q: exit %d, %q, want %q", args, code, out, want)
		}
	}
	if flows := s.ConntrackList("-p", "udp"); len(flows) > 0 {
		t.Errorf("it sent: %q", flows)
	}
}

// Fails when coturn's own client sees another NAT than probe.
func TestProbeAgreesWithAnotherClient(t *testing.T) {
	stage.OfTheDaemon(t)
	for name, tc := range map[string]struct {
		conenatd []string // flags, if it runs
		want     behaviour
		said     string
	}{
		"stock":      {nil, stock, "Address and Port Dependent Filtering"},
		"restricted": {stage.Auto, restricted, "NAT with Address Dependent Filtering"},
		"full cone":  {append(stage.NFT, "--filtering=endpoint_independent"), fullCone, "NAT with Endpoint Independent Filtering"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{})
			s.coturn(twoAddresses)
			if tc.conenatd != nil {
				s.Start(stage.Flags(tc.conenatd)...)
			}
			if got := behaviourOf(s.probe("--server", lab.PeerA.String())); got != tc.want {
				t.Errorf("probe: %+v, want %+v", got, tc.want)
			}
			path, args := debian.Program(coturn(t), "usr/bin/turnutils_natdiscovery", "-m", "-f", lab.PeerA.String())
			out, err := s.Inside(0).Command(t.Context(), path, args...).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "NAT with Endpoint Independent Mapping") || !strings.Contains(string(out), tc.said) {
				t.Errorf("turnutils_natdiscovery: %v: %s; want %q", err, out, tc.said)
			}
		})
	}
}
