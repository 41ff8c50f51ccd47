package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/e2e/stage"
)

// shells returns the folder with Debian's shells, unpacked and not installed.
func shells(t *testing.T) string {
	t.Helper()
	return debian.ForTest(t, "shells", debian.UnpackWhole, "bash", "bash-completion", "fish", "zsh")
}

// What a shell does with SCRIPT when the user types TYPED and the tabulator key. A zsh completes
// only at a terminal; TREE/zsh is one that runs there.
const (
	bashCompletes = `source TREE/usr/share/bash-completion/bash_completion
source SCRIPT
compopt() { :; } # for a shell that waits for the key
COMP_LINE='TYPED' COMP_POINT=${#COMP_LINE} COMP_TYPE=9 COMP_KEY=9
read -ra COMP_WORDS <<<"$COMP_LINE"
COMP_WORDS+=('') COMP_CWORD=${#COMP_WORDS[@]}-1
__start_conenatd
echo "${COMPREPLY[@]}"`
	fishCompletes = `source SCRIPT; complete -C 'TYPED'`
	zshCompletes  = `typeset -a own=(TREE/usr/lib/x86_64-linux-gnu/zsh/*(/))
module_path=($own)
zmodload zsh/zpty
zpty z ZSH -f -i
zpty -w z "module_path=($own); fpath=(TREE/usr/share/zsh/functions/**/*(/)); autoload -Uz compinit; compinit -u -D; source SCRIPT"
zpty -w -n z "TYPED"$'\t\t'
zpty -r z out '*auto*expect*nft*'
echo $out`
)

// Fails when a shell does not understand its script, or completes nothing by it.
func TestShellsCompleteWords(t *testing.T) {
	ownMode(t)
	tree := shells(t)
	command := func(program string, args ...string) string {
		name, all := debian.Program(tree, program, args...)
		return strings.Join(append([]string{name}, all...), " ")
	}
	for shell, tc := range map[string]struct{ program, completes string }{
		"bash": {command("bin/bash", "--norc"), bashCompletes},
		"fish": {command("usr/bin/fish", "--no-config"), fishCompletes},
		"zsh":  {command("bin/zsh", "-f"), zshCompletes},
	} {
		t.Run(shell, func(t *testing.T) {
			home := t.TempDir()
			script, err := exec.CommandContext(t.Context(), stage.Exe(), "completion", shell).Output()
			path := filepath.Join(home, "script")
			if err = errors.Join(err, os.WriteFile(path, script, 0o644), os.Symlink(stage.Exe(), filepath.Join(home, "conenatd"))); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), stage.Patience())
			defer cancel()
			text := strings.NewReplacer("TREE", tree, "SCRIPT", path, "TYPED", "conenatd run --backend ", "ZSH", command("bin/zsh")).Replace(tc.completes)
			words := append(strings.Fields(tc.program), "-c", text)
			cmd := exec.CommandContext(ctx, words[0], words[1:]...)
			cmd.Env = []string{"HOME=" + home, "TERM=xterm", fmt.Sprintf("PATH=%s:%s", home, os.Getenv("PATH"))}
			out, err := cmd.CombinedOutput()
			for _, word := range []string{"auto", "expect", "nft"} {
				if err != nil || !strings.Contains(string(out), word) {
					t.Fatalf("no %q: %v\n%q", word, err, out)
				}
			}
		})
	}
}
