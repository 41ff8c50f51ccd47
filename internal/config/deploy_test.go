package config

import (
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/pflag"
)

const example = "../../deploy/conenatd.toml"

// uncommented returns the example file with all keys in force.
func uncommented(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(example)
	if err != nil {
		t.Fatal(err)
	}
	return regexp.MustCompile(`(?m)^#(\S)`).ReplaceAllString(string(data), "$1")
}

func TestTheExampleFileChangesNothing(t *testing.T) {
	got, err := Load(example)
	if err != nil {
		t.Fatal(err)
	}
	if want := Default(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestTheExampleFileShowsTheDefaults(t *testing.T) {
	f, _, err := parse(example, uncommented(t))
	if err != nil {
		t.Fatal(err)
	}
	got, want := f.config, Default()
	want.Subnets = []Subnet{{Prefix: netip.MustParsePrefix("192.168.1.0/24")}}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestTheExampleFileHasEveryKey(t *testing.T) {
	found := findPositions(uncommented(t))
	for _, key := range topKeys() {
		if _, ok := found[place{0, key}]; !ok {
			t.Errorf("%s is missing", key)
		}
	}
	for field := range reflect.TypeFor[Subnet]().Fields() {
		if _, ok := found[place{1, subnetKey(field.Name)}]; !ok {
			t.Errorf("subnet.%s is missing", subnetKey(field.Name))
		}
	}
}

// subnetKey returns the key of a field of Subnet.
func subnetKey(field string) string {
	return strings.ToLower(regexp.MustCompile(`([a-z])([A-Z])`).ReplaceAllString(field, "${1}_$2"))
}

func TestEveryFlagHasItsKeyAndEveryKeyItsFlag(t *testing.T) {
	special := map[string]string{"subnet": "prefix", "routed": "routed"}
	var flags, keys []string
	var f Flags
	fs := pflag.NewFlagSet("run", pflag.ContinueOnError)
	f.Register(fs)
	fs.VisitAll(func(f *pflag.Flag) {
		if f.Name != "config" {
			flags = append(flags, f.Name)
		}
	})
	for field := range reflect.TypeFor[Subnet]().Fields() {
		keys = append(keys, subnetKey(field.Name))
	}
	for _, s := range settings {
		if !slices.Contains(keys, s.Name) { // else a subnet may have its own
			keys = append(keys, s.Name)
		}
	}
	for _, flag := range flags {
		name := strings.ReplaceAll(flag, "-", "_")
		i := slices.IndexFunc(keys, func(key string) bool {
			return key == special[flag] || key == name || key == name+"s"
		})
		if i < 0 {
			t.Errorf("--%s has no key", flag)
			continue
		}
		keys = slices.Delete(keys, i, i+1)
	}
	if len(keys) > 0 {
		t.Errorf("no flag for %v", keys)
	}
}

// At boot, things that the daemon needs may come minutes late. By default systemd gives up
// after five starts in ten seconds. Only a wrong configuration needs a human.
//
// Fails when a setting is missing or in a section where systemd ignores it, or when the
// unit does not know the exit status of a wrong configuration.
func TestTheUnitGivesUpForAWrongConfigurationAlone(t *testing.T) {
	data, err := os.ReadFile("../../deploy/systemd/conenatd.service")
	if err != nil {
		t.Fatal(err)
	}
	missing := []string{
		"[Unit] StartLimitIntervalSec=0", "[Service] Restart=on-failure", "[Service] RestartSec=5",
		fmt.Sprintf("[Service] RestartPreventExitStatus=%d", UsageStatus),
	}
	section := ""
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "[") {
			section = line
		}
		missing = slices.DeleteFunc(missing, func(s string) bool { return s == section+" "+line })
	}
	if len(missing) > 0 {
		t.Errorf("missing: %q", missing)
	}
}

// After a crash the permissions stay for the next daemon.
//
// Fails when the unit cleans up after any other end, or not after a timeout.
func TestTheUnitCleansUpAfterATimeoutAlone(t *testing.T) {
	data, err := os.ReadFile("../../deploy/systemd/conenatd.service")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "\nExecStopPost=/bin/sh -c '")
	script, _, found := strings.Cut(rest, "'\n")
	if !found {
		t.Fatal("no script")
	}
	script = strings.ReplaceAll(script, "/usr/bin/conenatd", "echo")
	for _, result := range []string{"success", "exit-code", "signal", "core-dump", "watchdog", "timeout"} { // systemd.exec(5)
		c := exec.Command("/bin/sh", "-c", script)
		c.Env = []string{"SERVICE_RESULT=" + result}
		out, err := c.Output()
		want := ""
		if result == "timeout" {
			want = "cleanup\n"
		}
		if err != nil || string(out) != want {
			t.Errorf("%s: %q, %v, want %q", result, out, err, want)
		}
	}
}

// Fails when the unit lets the daemon write where SECURITY.md does not say.
func TestTheUnitLetsTheDaemonWriteWhereItIsSaid(t *testing.T) {
	unit, err := os.ReadFile("../../deploy/systemd/conenatd.service")
	if err != nil {
		t.Fatal(err)
	}
	said, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	roots := map[string]string{"Runtime": "/run/", "Logs": "/var/log/", "State": "/var/lib/", "Cache": "/var/cache/", "Configuration": "/etc/"}
	var writable []string
	closed := map[string]bool{ // what the daemon could write without
		"ProtectSystem=strict": true, "ProtectHome=yes": true, "ProtectKernelTunables=yes": true,
		"ProtectControlGroups=yes": true, "PrivateDevices=yes": true,
	}
	temporary := "/var/tmp"
	for line := range strings.Lines(string(unit)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		root, isDirectory := roots[strings.TrimSuffix(key, "Directory")]
		switch {
		case closed[strings.TrimSpace(line)]:
			delete(closed, strings.TrimSpace(line))
		case strings.HasPrefix(key, "Bind") || key == "TemporaryFileSystem" || key == "ReadWriteDirectories":
			t.Errorf("the unit has %s, of which this test knows nothing", key)
		case line == "PrivateTmp=yes\n":
			temporary = "a /tmp and a /dev/shm of its own"
		case key == "ReadWritePaths":
			for path := range strings.FieldsSeq(value) {
				writable = append(writable, filepath.Base(path))
			}
		case isDirectory:
			for name := range strings.FieldsSeq(value) {
				writable = append(writable, root+name)
			}
		}
	}
	for directive := range closed {
		t.Errorf("the unit lacks %s", directive)
	}
	_, rest, _ := strings.Cut(string(said), "it can write only to")
	list, _, found := strings.Cut(rest, "and most system calls")
	if !found {
		t.Fatal("SECURITY.md does not say where the daemon can write")
	}
	for _, w := range append(writable, temporary) {
		if !strings.Contains(list, w) {
			t.Errorf("SECURITY.md does not name %s", w)
		}
	}
}
