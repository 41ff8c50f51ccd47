package internal_test

import (
	"math"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
)

// Fails when README gives the stripped program for amd64, or the small build, a size that is a thirtieth off.
func TestReadmeStatesTheSizeOnAmd64(t *testing.T) {
	for tags, pattern := range map[string]string{
		"":               `Stripped it has\s+([0-9.]+)\s+MB\s+on amd64`,
		"conenatd_small": `TAGS=conenatd_small` + "`" + `,\s+has\s+([0-9.]+) and`,
	} {
		m := regexp.MustCompile(pattern).FindStringSubmatch(read(t, "../README.md"))
		if m == nil {
			t.Fatalf("README does not have %q", pattern)
		}
		said, err := strconv.ParseFloat(m[1], 64)
		if err != nil {
			t.Fatal(err)
		}
		program := filepath.Join(t.TempDir(), "conenatd")
		build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-tags="+tags, "-ldflags=-s -w -buildid=", "-o", program, "../cmd/conenatd")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOARCH=amd64", "GOFLAGS=")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		info, err := os.Stat(program)
		if err != nil {
			t.Fatal(err)
		}
		if size := float64(info.Size()) / 1e6; math.Abs(size-said) > said/30 {
			t.Errorf("with tags %q the program has %.1f MB, and README says %v", tags, size, said)
		}
	}
}
