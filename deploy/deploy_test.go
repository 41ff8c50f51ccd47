package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
)

// program is the path of conenatd.
var program string

func TestMain(m *testing.M) {
	os.Exit(withProgram(m.Run))
}

func withProgram(run func() int) int {
	dir, err := os.MkdirTemp("", "conenatd-deploy-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "conenatd")
	if out, err := exec.Command("go", "build", "-o", program, "../cmd/conenatd").CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v\n%s", err, out)
		return 1
	}
	return run()
}

// need skips the test if a program is missing, except in CI.
func need(t *testing.T, name, debianPackage string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		debian.Missing(t, "no "+name+": install the Debian package "+debianPackage)
	}
}

// Fails when shellcheck has anything to say about a script.
func TestScriptsPassShellcheck(t *testing.T) {
	need(t, "shellcheck", "shellcheck")
	scripts := []string{initScript, "package/postinst", "package/postrm", "package/prerm"}
	others, err := filepath.Glob("../scripts/*")
	if err != nil || len(others) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	out, err := exec.CommandContext(t.Context(), "shellcheck", append(scripts, others...)...).CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "" {
		t.Errorf("%v\n%s", err, out)
	}
}
