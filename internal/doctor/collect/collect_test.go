package collect

import (
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/rules"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// Fails when saved tables are not found, when the user's own table with such a name is, and
// when doctor's lines leave something of ours or remove something of the user's.
func TestSavedTablesAreFoundAndRemoved(t *testing.T) {
	ours, err := rules.Text("conenat", rules.Desired{
		OutsideLinks: []string{"wan0"}, Subnets: []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}, Guard: true,
		Helpers: []string{"RAS"}, Map: &rules.MapConfig{Size: 1, Subnets: []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}},
	})
	if err != nil {
		t.Fatal(err)
	}
	const before, after = "table ip nat {\n\tchain c {\n\t}\n}\n", "table inet filter {\n\tset s {\n\t\ttype inet_service\n\t}\n}\n"
	root := t.TempDir()
	path := filepath.Join(root, "etc/nftables.conf")
	// As nft lists it while conenatd runs.
	ours = strings.Replace(ours, "table ip conenat {\n", "table ip conenat { # progname conenatd\n\tflags owner\n\n", 1)
	write(t, path, before+ours+after)
	write(t, filepath.Join(root, "etc/nftables.d/theirs.nft"), "table inet conenat {\n\tchain c {\n\t}\n}\n")
	found := saved(root)
	if want := []doctor.Saved{{Path: path, Tables: []string{"inet conenat", "ip conenat"}}}; !cmp.Equal(want, found) {
		t.Fatalf("found %+v, want %+v", found, want)
	}
	for _, f := range doctor.Diagnose(doctor.Facts{Running: true, Saved: found}).Findings {
		for _, l := range f.Fix {
			if out, err := exec.CommandContext(t.Context(), "sh", "-c", l.Line).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v %s", l.Line, err, out)
			}
		}
	}
	if found := saved(root); len(found) > 0 {
		t.Errorf("still there: %+v", found)
	}
	left, err := os.ReadFile(path)
	if err != nil || string(left) != before+after {
		t.Errorf("%v: left %q", err, left)
	}
}

// Fails when a setting of a link is not read, when one that may not be written counts as
// writable, or when a missing one has a value.
func TestSysctlsAreRead(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "net/ipv4/ip_forward"), "1\n")
	write(t, filepath.Join(root, "net/ipv4/conf/eth0.5/rp_filter"), "2\n")
	want := doctor.Sysctls{"net/ipv4/ip_forward": {Value: "1", Writable: true}, "net/ipv4/conf/eth0.5/rp_filter": {Value: "2", Writable: true}}
	if got := sysctls(root, []string{"eth0.5"}); !cmp.Equal(want, got) {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// Fails when doctor tells a user who is not root that nobody can change a setting, and when it says
// so of a setting that root may not change either.
func TestSettingsThatRootMayWriteAreKnown(t *testing.T) {
	path := filepath.Join(t.TempDir(), "setting")
	write(t, path, "1\n")
	for _, tt := range []struct {
		mode fs.FileMode
		err  error
		want bool
	}{
		{0o644, syscall.EACCES, true}, {0o644, nil, false}, {0o644, syscall.EROFS, false}, {0o444, syscall.EACCES, false},
	} {
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		if got := byRoot(path, tt.err); got != tt.want {
			t.Errorf("mode %o, %v: %v", tt.mode, tt.err, got)
		}
	}
}
