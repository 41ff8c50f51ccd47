package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
)

// Fails when a shell completes other words, or files where none can stand.
func TestValuesAreCompleted(t *testing.T) {
	for line, want := range map[string][]string{
		"run --backend ":    {"auto", "expect", "nft", ":4"},
		"run --events=":     {"auto", "all", "lean", ":4"},
		"run --mapping ":    {"kernel", "endpoint_independent", ":4"},
		"doctor --on-stop ": {"revoke", "keep", ":4"},
		"config --config ":  {"toml", ":8"},
		"check ":            {"toml", ":8"},
		"list --state ":     {"standing", "refused", "waiting", ":4"},
		"top --state ":      {"standing", "refused", "waiting", ":4"},
		"top --interval ":   {":4"},
		"run --lifetime ":   {":4"},
		"probe --server ":   {":4"},
		"list --host ":      {":4"},
		"run --audit-log ":  {":0"},
		"revoke ":           {":4"},
		"explain ":          {":4"},
		"status ":           {":4"},
	} {
		args := append([]string{cobra.ShellCompNoDescRequestCmd}, strings.Split(line, " ")...)
		c := command(nil)
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetErr(new(bytes.Buffer))
		c.SetArgs(args)
		if err := c.Execute(); err != nil {
			t.Fatal(err)
		}
		if got := strings.Fields(out.String()); !slices.Equal(got, want) {
			t.Errorf("%q: %q, want %q", line, got, want)
		}
	}
}

func TestTheThreeShellsHaveScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		c := command(nil)
		var out bytes.Buffer
		c.SetOut(&out)
		c.SetArgs([]string{"completion", shell})
		if err := c.Execute(); err != nil || !strings.Contains(out.String(), "__complete") {
			t.Errorf("%s: %v, %d bytes", shell, err, out.Len())
		}
	}
}
