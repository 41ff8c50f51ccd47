package config

import "testing"

// Fails when a limit that was set depends on the size of the table, or when an Auto limit
// does not.
func TestLimitsSuitTheConntrackTable(t *testing.T) {
	for _, tt := range []struct {
		args              []string
		entries           int
		perHost, children int
	}{
		{nil, 0, 4096, 256},
		{nil, 262_144, 4096, 256},
		{nil, 8192, 4096, 256},
		{nil, 4096, 2048, 128},
		{nil, 16, 8, 1},
		{[]string{"--max-permissions-per-host=auto", "--max-children=auto"}, 4096, 2048, 128},
		{[]string{"--max-permissions-per-host=4096", "--max-children=256"}, 4096, 4096, 256},
		{[]string{"--max-permissions-per-host=0", "--max-children=0"}, 4096, 0, 0},
	} {
		asked, err := resolve(t, append(tt.args, "--subnet=10.0.0.0/8")...)
		if err != nil {
			t.Fatal(err)
		}
		got := asked.Sized(tt.entries)
		if got.MaxPermissionsPerHost != tt.perHost || got.MaxChildren != tt.children {
			t.Errorf("%q, %d entries: %d permissions of a host, %d children; want %d, %d",
				tt.args, tt.entries, got.MaxPermissionsPerHost, got.MaxChildren, tt.perHost, tt.children)
		}
	}
}
