package main

import (
	"bytes"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/config"
)

// Fails when a wrong command line is not refused, or its error does not say where it is wrong and
// what was expected.
func TestWrongCommandLinesAreRefused(t *testing.T) {
	for line, want := range map[string]string{
		"config x":                              `config: expected no argument, got "x"`,
		"run --guard maybe":                     `run: expected no argument, got "maybe"`,
		"revoke":                                "revoke: expected WORD..., got 0 arguments",
		"explain 203.0.113.5":                   "explain: expected PEER[:PORT] EXT:PORT, got 1 argument",
		"run --lifetme 5m":                      "run: unknown flag: --lifetme; did you mean --lifetime?",
		"config --exclude_peer_ports 53":        "config: unknown flag: --exclude_peer_ports; did you mean --exclude-peer-port?",
		"list --hots 10.47.11.109":              "did you mean --host?",
		"list --quiet":                          `list: unknown flag: --quiet; "conenatd list --help" lists all`,
		"run --subnet":                          "run: flag needs an argument: --subnet",
		"list --host 1.2.3":                     `--host: host "1.2.3": expected an address`,
		"help me":                               `unknown command "me" for "conenatd"; "conenatd --help" lists all`,
		"help lsit":                             `unknown command "lsit" for "conenatd"; did you mean "list"?`,
		"foo":                                   `unknown command "foo" for "conenatd"; "conenatd --help" lists all`,
		"Status --json":                         `unknown command "Status" for "conenatd"; did you mean "status"?`,
		"completion tcsh":                       `completion: expected bash, zsh or fish, got "tcsh"`,
		"revoke phone":                          `revoke "phone": expected an address`,
		"explain 203.0.113.5 198.51.100.1":      `outside endpoint "198.51.100.1": expected`,
		"explain 2001:db8::5 198.51.100.1:5060": "expected both of IPv4, or both of IPv6",
		"explain 203.0.113.5:70000 198.51.100.1:5060": `peer "203.0.113.5:70000": expected`,
	} {
		root := command(nil)
		var out bytes.Buffer
		root.SetOut(&out)
		refuseUnknownTopics(root)
		root.SetArgs(strings.Fields(line))
		if err := unknownCommand(root, root.Execute()); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") || out.Len() > 0 {
			t.Errorf("%s: %v, want %q\n%s", line, err, want, &out)
		}
	}
	root := command(nil)
	root.SetArgs([]string{"revoke", "10.47.11.5/24"})
	if err := root.Execute(); !config.IsUsage(err) {
		t.Errorf("%v is no error of the command line", err)
	}
}

// Fails when a command that could not print says nothing, or says it once for each line.
func TestOutputThatIsLostIsAnError(t *testing.T) {
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer full.Close()
	out := &output{Writer: full}
	root := command(nil)
	root.SetOut(out)
	root.SetArgs([]string{"version"})
	if err := errors.Join(root.Execute(), out.err); err == nil {
		t.Error("nothing was printed, and there is no error")
	}
	_, again := out.Write([]byte("more\n"))
	if text := out.err.Error(); again == nil || strings.Contains(text, "\n") {
		t.Errorf("%v, then %q", again, text)
	}
}
