package deploy

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"github.com/conenatd/conenatd/internal/config"
)

// nixpkgs has stand-ins for nixpkgs: as much of its interface as the files use. Packages and
// generated files are text.
const nixpkgs = `
let
  lib = {
    cleanSource = toString;
    getExe = p: p + "/bin/conenatd";
    licenses.mit = "MIT";
    literalExpression = text: text;
    mkEnableOption = text: { default = false; };
    mkIf = condition: value: if condition then value else { };
    mkOption = option: option;
    platforms.linux = [ ];
    types.package = "package";
  };
  buildGoModule = package: package;
  pkgs = {
    callPackage = file: more: import file ({ inherit lib buildGoModule; } // more);
    formats.toml = none: {
      type = "toml";
      generate = name: builtins.toJSON;
    };
    runCommand = name: env: script: script;
  };
  with_ = settings: (import ./nixos/module.nix {
    inherit lib pkgs;
    config.services.conenatd = { enable = true; package = "/nix/store/conenatd"; inherit settings; };
  }).config;
  off = (import ./nixos/module.nix {
    inherit lib pkgs;
    config.services.conenatd = { enable = false; };
  });
in
`

// eval evaluates an expression of Nix behind the stand-ins.
func eval(t *testing.T, expression string, v any) {
	t.Helper()
	need(t, "nix-instantiate", "nix-bin")
	c := exec.CommandContext(t.Context(), "nix-instantiate", "--eval", "--strict", "--json", "-E", nixpkgs+expression)
	c.Env = append(os.Environ(), "NIX_REMOTE=dummy://") // neither a store nor a daemon
	var errs strings.Builder
	c.Stderr = &errs
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %s", err, errs.String())
	}
	if err := json.Unmarshal(out, v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

// Fails when the service does not get its settings, when they are not checked before, when a
// file that the module installs is not there, and when something happens without "enable".
func TestNixOSModule(t *testing.T) {
	type result struct {
		Etc        map[string]string
		Assertions []bool
		User       string
		Wanted     []string
		Triggers   []string
	}
	get := func(settings string) (r result) {
		eval(t, `let c = with_ `+settings+`; in {
			etc = builtins.mapAttrs (name: f: toString f.source) c.environment.etc;
			assertions = map (a: a.assertion) c.assertions;
			user = c.users.users.conenatd.group;
			wanted = c.systemd.services.conenatd.wantedBy;
			triggers = c.systemd.services.conenatd.reloadTriggers;
		}`, &r)
		return r
	}
	r := get(`{ lifetime = "10m"; exclude_peer_ports = [ 53 "1000-2000" ]; subnet = [ { prefix = "192.168.1.0/24"; routed = true; } ]; }`)
	script := r.Etc["conenatd/conenatd.toml"]
	check, rest, _ := strings.Cut(script, " check ")
	settings, install, _ := strings.Cut(rest, "\n")
	if check != "/nix/store/conenatd/bin/conenatd" || install != "cp "+settings+" $out\n" {
		t.Errorf("the file is made by %q", script)
	}
	var v map[string]any
	d := json.NewDecoder(strings.NewReader(settings))
	d.UseNumber()
	if err := d.Decode(&v); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "conenatd.toml")
	f, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := toml.NewEncoder(f).Encode(v); err != nil {
		t.Fatal(err)
	}
	if c, err := config.Load(file); err != nil || len(c.Subnets) != 1 || !c.Subnets[0].Routed {
		t.Errorf("%+v: %v", c, err)
	}
	for name, source := range r.Etc {
		if name == "conenatd/conenatd.toml" {
			continue
		}
		if _, err := os.Stat(source); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if slices.Contains(r.Assertions, false) || r.User != "conenatd" || !slices.Equal(r.Triggers, []string{script}) || !slices.Contains(r.Wanted, "multi-user.target") {
		t.Errorf("got %+v", r)
	}
	if r := get(`{ }`); !slices.Contains(r.Assertions, false) {
		t.Error("a service without a subnet is not refused")
	}
	var nothing struct {
		Options []string
		Config  map[string]any
	}
	eval(t, `{ options = builtins.attrNames off.options.services.conenatd; config = off.config; }`, &nothing)
	if !slices.Equal(nothing.Options, []string{"enable", "package", "settings"}) || len(nothing.Config) > 0 {
		t.Errorf("without enable: %+v", nothing)
	}
}

// Fails when the hash of the dependencies is not that of go.mod, and when a file of the
// package, or a program that its unit starts, is not there.
func TestNixPackage(t *testing.T) {
	var p struct{ Src, VendorHash, PostInstall, MainProgram string }
	eval(t, `let p = pkgs.callPackage ./nixos/package.nix { }; in {
		inherit (p) src vendorHash postInstall;
		inherit (p.meta) mainProgram;
	}`, &p)
	top, err := filepath.Abs("..")
	if err != nil || p.Src != top {
		t.Errorf("the source is %s, want %s: %v", p.Src, top, err)
	}

	out := t.TempDir()
	c := exec.CommandContext(t.Context(), "sh", "-eu", "-c", `
		out=$1
		install -D "$2" "$out/bin/$3"
		substituteInPlace() { [ "$2" = --replace-fail ]; grep -q "$3" "$1"; sed -i "s|$3|$4|g" "$1"; }
		eval "$4"`, "sh", out, program, p.MainProgram, p.PostInstall)
	c.Dir = top
	if text, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	unit, err := os.ReadFile(filepath.Join(out, "lib/systemd/system/conenatd.service"))
	if err != nil {
		t.Fatal(err)
	}
	started := 0
	for _, path := range regexp.MustCompile(`[^\s=]*/bin/conenatd`).FindAllString(string(unit), -1) {
		started++
		if info, err := os.Stat(path); err != nil || info.Mode()&0o111 == 0 {
			t.Errorf("%s: %v", path, err)
		}
	}
	if started < 3 {
		t.Errorf("the unit starts %d programs", started)
	}

	vendor := filepath.Join(t.TempDir(), "vendor")
	c = exec.CommandContext(t.Context(), "go", "mod", "vendor", "-o", vendor)
	c.Env = append(os.Environ(), "GOFLAGS=")
	if text, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	text, err := exec.CommandContext(t.Context(), "nix-hash", "--type", "sha256", vendor).Output()
	if err != nil {
		t.Fatal(err)
	}
	sum, err := hex.DecodeString(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if want := "sha256-" + base64.StdEncoding.EncodeToString(sum); p.VendorHash != want {
		t.Errorf("go.mod has changed: set vendorHash = %q in nixos/package.nix", want)
	}
}
