package main

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/conenatd/conenatd/internal/reference"
)

var update = flag.Bool("update", false, "write the generated files")

// generated returns the files that come from the keys of the configuration and from the
// commands.
func generated() map[string][]byte {
	return map[string][]byte{
		"docs/configuration.md":       reference.Markdown(),
		"deploy/conenatd.toml":        reference.Example(),
		"deploy/conenatd.schema.json": reference.Schema(),
		"deploy/man/conenatd.8":       reference.CommandPage(command(nil)),
		"deploy/man/conenatd.toml.5":  reference.FilePage(),
	}
}

// Fails when a key, a flag or a command changed without "make generate".
func TestGeneratedFilesAreCurrent(t *testing.T) {
	for name, want := range generated() {
		path := filepath.Join("../..", name)
		if *update {
			if err := os.WriteFile(path, want, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s is stale: run make generate (%v)", name, err)
		}
	}
}

// Fails when groff warns of a page, for example of a macro that does not exist.
func TestManualPagesAreWellFormed(t *testing.T) {
	man, err := exec.LookPath("man")
	if err != nil {
		t.Skip("man is not installed")
	}
	for _, page := range []string{"conenatd.8", "conenatd.toml.5"} {
		c := exec.Command(man, "--warnings", "-E", "UTF-8", "-l", "-Tutf8", "-Z", filepath.Join("../../deploy/man", page))
		c.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "MANROFFSEQ=")
		var complaints bytes.Buffer
		c.Stderr = &complaints
		out, err := c.Output()
		if err != nil || complaints.Len() > 0 || len(out) < 1000 {
			t.Errorf("%s: %v, %d bytes\n%s", page, err, len(out), complaints.Bytes())
		}
	}
}
