package deploy

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/BurntSushi/toml"

	"github.com/conenatd/conenatd/internal/config"
)

const (
	initScript = "openwrt/conenatd/files/conenatd.init"
	uciFile    = "openwrt/conenatd/files/conenatd.config"
	luciApp    = "openwrt/luci-app-conenatd/"
)

// standIn is a stand-in for OpenWrt's rc.common, functions.sh and procd.sh: as much of their
// interface as the init script uses. A file of UCI is read as the shell commands as which
// "uci export" would print it.
const standIn = `
package() { :; }
config() { config_cb "$1" "${2:-cfg}"; }
option() { option_cb "$1" "$2"; }
list() { list_cb "$1" "$2"; }
reset_cb() { config_cb() { :; }; option_cb() { :; }; list_cb() { :; }; }
reset_cb
config_load() { . "$UCI/$1"; config_cb; }
get_bool() { case "$1" in 1 | on | true | yes | enabled) echo 1 ;; 0 | off | false | no | disabled) echo 0 ;; *) echo "$2" ;; esac; }
logger() { echo "logger $*" >>"$UCI/log"; }
procd_open_instance() { echo open; }
procd_set_param() { echo "$*"; }
procd_close_instance() { echo close; }
. "$1"
PROG=$CONENATD TOML=$UCI/etc/conenatd.toml
start_service && echo set
`

// A router runs the init script with the shells that are here.
type router struct {
	*testing.T
	shell []string
	dir   string
}

func onRouters(t *testing.T, play func(router)) {
	for _, shell := range [][]string{{"sh"}, {"busybox", "sh"}} {
		t.Run(strings.Join(shell, " "), func(t *testing.T) {
			need(t, shell[0], "busybox-static")
			play(router{t, shell, t.TempDir()})
		})
	}
}

// start starts the service with a file of UCI, and returns what procd and the person at the
// terminal were told.
func (r router) start(uci string) (procd, complaint string, err error) {
	r.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, "conenatd"), []byte(uci), 0o644); err != nil {
		r.Fatal(err)
	}
	args := append(slices.Clone(r.shell[1:]), "-c", standIn, "rc.common", initScript)
	c := exec.CommandContext(r.Context(), r.shell[0], args...)
	c.Env = append(os.Environ(), "UCI="+r.dir, "CONENATD="+program)
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err = c.Run()
	return out.String(), errs.String(), err
}

// toml returns the file that the daemon would read.
func (r router) toml() string {
	text, err := os.ReadFile(filepath.Join(r.dir, "etc/conenatd.toml"))
	if err != nil && !os.IsNotExist(err) {
		r.Fatal(err)
	}
	return string(text)
}

func (r router) config() config.Config {
	r.Helper()
	c, err := config.Load(filepath.Join(r.dir, "etc/conenatd.toml"))
	if err != nil {
		r.Fatal(err)
	}
	return c
}

// Fails when the file as it is installed starts something, and when the only change that it
// needs is not enough.
func TestOpenWrtServesTheLANOnceEnabled(t *testing.T) {
	text, err := os.ReadFile(uciFile)
	if err != nil {
		t.Fatal(err)
	}
	onRouters(t, func(r router) {
		procd, complaint, err := r.start(string(text))
		if procd != "set\n" || complaint != "" || err != nil {
			r.Errorf("not enabled: procd %q, complaint %q, %v", procd, complaint, err)
		}
		procd, complaint, err = r.start(strings.Replace(string(text), "enabled '0'", "enabled '1'", 1))
		if complaint != "" || err != nil {
			r.Fatalf("enabled: %q, %v", complaint, err)
		}
		file := filepath.Join(r.dir, "etc/conenatd.toml")
		for _, line := range []string{
			"open\ncommand " + program + " run --config " + file + "\n", "\nfile " + file + "\n", "\nreload_signal HUP\n", "close\nset\n",
		} {
			if !strings.Contains(procd, line) {
				r.Errorf("procd was told %q, want %q", procd, line)
			}
		}
		const want = "log_format = \"text\"\n\n[[subnet]]\nprefix = \"br-lan\"\n"
		if got := r.toml(); got != want {
			r.Errorf("got %q, want %q", got, want)
		}
	})
}

var update = flag.Bool("update", false, "write the names of the truths into the script")

// Fails when a key has a type that the script does not know, for example a new truth. With
// -update it writes the names of the truths there.
func TestOpenWrtKnowsEveryKey(t *testing.T) {
	var truths []string
	keys := slices.Clone(config.SubnetKeys())
	for _, s := range config.Sections() {
		keys = append(keys, s.Keys...)
	}
	var main, subnet strings.Builder
	for i, k := range keys {
		if k.Kind == "bool" {
			truths = append(truths, k.Name)
		}
		if k.Name == "prefix" {
			continue
		}
		var v map[string]any
		if _, err := toml.Decode("v = "+k.Default, &v); err != nil {
			t.Fatal(err)
		}
		section := &main
		if i < len(config.SubnetKeys()) {
			section = &subnet
		}
		writeUCI(section, k.Name, v["v"])
	}
	text := "config subnet\n\toption prefix '192.168.1.0/24'\n" + subnet.String() +
		"config conenatd 'main'\n\toption enabled 'yes'\n" + main.String()
	script, err := os.ReadFile(initScript)
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(truths)
	line := fmt.Sprintf("TRUTHS=\" %s \"\n", strings.Join(slices.Compact(truths), " "))
	if *update {
		script = regexp.MustCompile("(?m)^TRUTHS=.*\n").ReplaceAllLiteral(script, []byte(line))
		if err := os.WriteFile(initScript, script, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Contains(script, []byte(line)) {
		t.Errorf("%s has no line %s", initScript, line)
	}
	onRouters(t, func(r router) {
		if _, complaint, err := r.start(text); err != nil {
			r.Fatalf("%q, %v", complaint, err)
		}
		want := filepath.Join(r.dir, "want.toml")
		if err := os.WriteFile(want, []byte("[[subnet]]\nprefix = \"192.168.1.0/24\"\n"), 0o644); err != nil {
			r.Fatal(err)
		}
		defaults, err := config.Load(want)
		if err != nil {
			r.Fatal(err)
		}
		if got := r.config(); !reflect.DeepEqual(got, defaults) {
			r.Errorf("got  %+v\nwant %+v\nfrom %s", got, defaults, r.toml())
		}
	})
}

// writeUCI writes a value of TOML as UCI has it.
func writeUCI(w *strings.Builder, key string, v any) {
	if items, ok := v.([]any); ok {
		for _, i := range items {
			fmt.Fprintf(w, "\tlist %s '%v'\n", key, i)
		}
		return
	}
	if truth, ok := v.(bool); ok {
		v = map[bool]string{true: "1", false: "0"}[truth]
	}
	fmt.Fprintf(w, "\toption %s '%v'\n", key, v)
}

// Fails when a value changes on its way, or the shell takes it for a command.
func TestOpenWrtKeepsValues(t *testing.T) {
	const uci = `
config conenatd 'main'
	option enabled 'on'
	option uplink_mask '0x00f00000'
	option learn_rate '300'
	option guard 'off'
	option audit_log '/tmp/"a\b" $(touch '"$UCI"'/oops)'
	list outside 'pppoe-wan'
	list outside '0x1'
	list exclude_ports '5060'
	list exclude_ports '10000-20000'
	option lifetime '10m'
config subnet
	option prefix '192.168.1.0/24'
	list port_pool '7472-7487'
	list port_pool '9000'
	option mapping 'endpoint_independent'
config subnet
	option prefix 'br-guest'
	option routed 'true'
`
	// A link may have a name like a number; TOML takes it for one, and says so.
	onRouters(t, func(r router) {
		_, complaint, err := r.start(uci)
		if err == nil || !strings.Contains(complaint, "outside: expected the name of a link") {
			r.Errorf("a number as a link: %q, %v", complaint, err)
		}
		if _, complaint, err := r.start(strings.Replace(uci, "'0x1'", "'wan 1'", 1)); err == nil || !strings.Contains(complaint, `"wan 1"`) {
			r.Errorf("a link with a blank: %q, %v", complaint, err)
		}
		if _, complaint, err := r.start(strings.Replace(uci, "'0x1'", "'wan1'", 1)); err != nil {
			r.Fatalf("%q, %v", complaint, err)
		}
		got := r.config()
		if want := `/tmp/"a\b" $(touch ` + r.dir + `/oops)`; got.AuditLog != want {
			r.Errorf("audit_log %q, want %q", got.AuditLog, want)
		}
		if _, err := os.Stat(filepath.Join(r.dir, "oops")); err == nil {
			r.Error("the shell carried out a value")
		}
		const want = `uplink_mask = 0x00f00000
learn_rate = 300
guard = false
`
		if text := r.toml(); !strings.HasPrefix(text, want) || !strings.Contains(text, `exclude_ports = [5060, "10000-20000"]`) ||
			!strings.Contains(text, "port_pool = [\"7472-7487\", 9000]\nmapping") || !strings.HasSuffix(text, "routed = true\n") {
			r.Errorf("got %s", text)
		}
	})
}

// Fails when something starts, stops or changes although the configuration is wrong, and when
// the reason is not one sentence.
func TestOpenWrtRefusesWhatIsWrong(t *testing.T) {
	const good = "config conenatd 'main'\n\toption enabled '1'\nconfig subnet\n\toption prefix 'br-lan'\n"
	onRouters(t, func(r router) {
		if _, complaint, err := r.start(good); err != nil {
			r.Fatalf("%q, %v", complaint, err)
		}
		before := r.toml()
		for _, c := range []struct{ uci, want string }{
			{good + "config subnet\n\toption prefix 'br-lan'\n", "br-lan"},
			{good + "\toption port_pool '7000-7100'\n", "port_pool"},
			{strings.Replace(good, "config subnet", "\toption self '1'\n\toption backend 'nft'\nconfig subnet", 1), "self"},
			{strings.Replace(good, "config subnet", "\toption lifetime '1m'\nconfig conenatd 'other'\n\toption lifetime '2m'\nconfig subnet", 1), "lifetime"},
			{good + "\toption mapping 'kernel'\n\tlist mapping 'kernel'\n", "mapping"},
			{strings.Replace(good, "'1'", "'maybe'", 1), "option enabled: expected '0' or '1'"},
			{strings.Replace(good, "'1'", "'1'\n\toption lifetme '5m'", 1), "did you mean lifetime?"},
			{good + "config zone\n\toption name 'lan'\n", "'config zone': expected"},
			{"config conenatd 'main'\n\toption enabled '1'\n", "no subnet is enabled"},
		} {
			procd, complaint, err := r.start(c.uci)
			if err == nil {
				r.Errorf("%s is accepted: %s", c.uci, r.toml())
				continue
			}
			if procd != "" || r.toml() != before || !strings.Contains(complaint, c.want) ||
				!strings.HasPrefix(complaint, "conenatd: /etc/config/conenatd") || strings.Count(complaint, "\n") != 1 {
				r.Errorf("%s: procd %q, complaint %q", c.uci, procd, complaint)
			}
		}
		log, err := os.ReadFile(filepath.Join(r.dir, "log"))
		if err != nil || bytes.Count(log, []byte("logger -t conenatd -p daemon.err /etc/config")) != 9 {
			r.Errorf("the log has %s", log)
		}
	})
}

// Fails when the menu names a page that is not there, and when the page offers an option that
// conenatd does not have, or in another form.
func TestLuCIPageFitsTheConfiguration(t *testing.T) {
	var menu map[string]struct {
		Action  struct{ Path string }
		Depends struct {
			ACL []string
			UCI map[string]bool
		}
	}
	readJSON(t, luciApp+"root/usr/share/luci/menu.d/luci-app-conenatd.json", &menu)
	var acl map[string]struct {
		Read, Write struct {
			File map[string][]string
			UCI  []string
		}
	}
	readJSON(t, luciApp+"root/usr/share/rpcd/acl.d/luci-app-conenatd.json", &acl)
	item := menu["admin/network/conenatd"]
	if len(item.Depends.ACL) != 1 || !item.Depends.UCI["conenatd"] {
		t.Errorf("menu: %+v", menu)
	}
	may := acl[item.Depends.ACL[0]]
	page, err := os.ReadFile(luciApp + "htdocs/luci-static/resources/view/" + item.Action.Path + ".js")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`fs\.exec\('([^']+)', \[ '([^']+)' \]`).FindAllSubmatch(page, -1) {
		if command := fmt.Sprintf("%s %s", m[1], m[2]); !slices.Equal(may.Read.File[command], []string{"exec"}) {
			t.Errorf("the page may not run %s", command)
		}
	}
	main, subnets, found := strings.Cut(string(page), "form.GridSection, 'subnet'")
	if !found || !slices.Contains(may.Write.UCI, "conenatd") {
		t.Errorf("no subnets, or the page may change nothing: %+v", may)
	}
	var keys []config.Key
	for _, s := range config.Sections() {
		keys = append(keys, s.Keys...)
	}
	offered := offers(t, main, append(keys, config.Key{Name: "enabled", Kind: "bool"}))
	offered = append(offered, offers(t, subnets, config.SubnetKeys())...)
	for _, name := range []string{"enabled", "backend", "outside", "prefix", "filtering", "mapping"} {
		if !slices.Contains(offered, name) {
			t.Errorf("the page does not offer %s", name)
		}
	}
}

// offers returns the options of a part of the page, and compares them with the keys.
func offers(t *testing.T, page string, keys []config.Key) (names []string) {
	option := regexp.MustCompile(`s\.option\(form\.(\w+), '(\w+)'`)
	value := regexp.MustCompile(`o\.value\((?:'', )?'(\w+)'\)`)
	at := option.FindAllStringSubmatchIndex(page, -1)
	for n, m := range at {
		widget, name := page[m[2]:m[3]], page[m[4]:m[5]]
		names = append(names, name)
		i := slices.IndexFunc(keys, func(k config.Key) bool { return k.Name == name })
		if i < 0 {
			t.Errorf("conenatd has no key %s", name)
			continue
		}
		k, want := keys[i], "Value"
		switch {
		case k.List:
			want = "DynamicList"
		case k.Kind == "bool":
			want = "Flag"
		case k.Kind == "word":
			want = "ListValue"
		}
		if widget != want {
			t.Errorf("%s is a %s, want a %s", name, widget, want)
		}
		end := len(page)
		if n+1 < len(at) {
			end = at[n+1][0]
		}
		var words []string
		for _, v := range value.FindAllStringSubmatch(page[m[1]:end], -1) {
			words = append(words, v[1])
		}
		slices.Sort(words)
		known := slices.Sorted(slices.Values(k.Words))
		if want == "ListValue" && !slices.Equal(words, known) {
			t.Errorf("%s offers %q, want %q", name, words, known)
		}
	}
	return names
}

func readJSON(t *testing.T, path string, v any) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(text, v); err != nil {
		t.Fatalf("%s: %v", path, err)
	}
}
