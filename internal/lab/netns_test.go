package lab

import (
	"context"
	"errors"
	"os/exec"
	"runtime"
	"strings"
	"testing"
)

func TestDoGivesBackTheErrorAndSurvivesGoexit(t *testing.T) {
	l := ForTest(t, Options{})
	want := errors.New("mine")
	if err := l.Gateway.Do(func() error { return want }); !errors.Is(err, want) {
		t.Errorf("Do: %v", err)
	}
	err := l.Gateway.Do(func() error {
		runtime.Goexit()
		return nil
	})
	if !errors.Is(err, errGoexit) {
		t.Errorf("Do with Goexit: %v", err)
	}
}

func TestSysctlIsTheNamespacesOwn(t *testing.T) {
	l := ForTest(t, Options{})
	const name = "net.ipv4.ip_default_ttl"
	must(t, l.Gateway.SetSysctl(name, "33"))
	for h, want := range map[*Host]string{l.Gateway: "33", l.Outside: "64"} {
		if got, err := h.Sysctl(name); err != nil || got != want {
			t.Errorf("%s = %q, %v; want %s", name, got, err, want)
		}
	}
	if err := l.Gateway.SetSysctl("kernel.hostname", "x"); err == nil {
		t.Error("a sysctl of the whole machine can be set")
	}
}

func TestCommandsRunInside(t *testing.T) {
	l := ForTest(t, Options{})
	for name, run := range map[string]func(*Cmd) ([]byte, error){
		"Output":         (*Cmd).Output,
		"CombinedOutput": (*Cmd).CombinedOutput,
		"Start": func(c *Cmd) ([]byte, error) {
			var out strings.Builder
			c.Stdout = &out
			err := c.Start()
			if err == nil {
				err = c.Wait()
			}
			return []byte(out.String()), err
		},
	} {
		out, err := run(l.Inside(0).Command(context.Background(), "ip", "-4", "-oneline", "addr"))
		if err != nil || !strings.Contains(string(out), "10.47.11.109/24") {
			t.Errorf("%s: %q, %v", name, out, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	sleep := l.Outside.Command(ctx, "sleep", "1000")
	must(t, sleep.Start())
	cancel()
	if err := sleep.Wait(); err == nil {
		t.Error("the command outlives its context")
	}
	if _, err := l.Gateway.Output("ip", "link", "show", "nosuch"); err == nil ||
		!strings.Contains(err.Error(), `run ip link show nosuch: exit status 1: Device "nosuch" does not exist.`) {
		t.Errorf("Output of a command that fails: %v", err)
	}
}

func TestAMissingProgramIsNamedWithItsPackage(t *testing.T) {
	for name, want := range map[string]string{
		"ip":                      "ip not found: install the Debian package iproute2",
		"nft":                     "nft not found: install the Debian package nftables",
		"conntrack":               "conntrack not found: install the Debian package conntrack",
		"iptables-legacy-restore": "iptables-legacy-restore not found: install the Debian package iptables",
		"frobnicate":              "frobnicate not found",
	} {
		if got := missingError(name).Error(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	ns := ForTest(t, Options{}).Outside
	if _, err := ns.Output("no-such-program"); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("run a program that is not there: %v", err)
	}
}

func TestProgramsAreFoundWithoutSbinInPATH(t *testing.T) {
	t.Setenv("PATH", "/usr/bin:/bin")
	if _, err := program("nft"); err != nil {
		t.Error(err)
	}
}
