package nftversions

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/debian"
	"github.com/conenatd/conenatd/internal/lab"
)

// iptables scripts work beside conenatd, do not see its rules, and change only their
// own.
func TestIPTablesWorksBeside(t *testing.T) {
	all := eachNFT(t)
	f := features[slices.IndexFunc(features, func(f feature) bool { return f.name == "mapping and hairpin" })]
	// Legacy comes last, because iptables-nft warns of its tables.
	for _, family := range []string{"iptables-nft", "ip6tables-nft", "iptables-legacy", "ip6tables-legacy"} {
		t.Run(family, func(t *testing.T) {
			s := f.play(t)
			n := all[0]
			before, err := n.bytecode(s.Gateway.Namespace)
			s.Must(err)
			run := func(text, name string, args ...string) string {
				t.Helper()
				path, err := exec.LookPath(name)
				s.Must(err)
				out, err := execute(s.Gateway.Namespace, text, nil, path, args...)
				if err != nil {
					t.Errorf("%s %v: %v", name, args, err)
				}
				if strings.Contains(out, "conenat") || strings.Contains(out, "incompatible") {
					t.Errorf("%s %v shows\n%s", name, args, out)
				}
				return out
			}
			for _, table := range []string{"filter", "nat", "mangle", "raw"} {
				run("", family, "-t", table, "-n", "-v", "-L")
				run("", family, "-t", table, "-S")
			}
			run("", family, "-A", "INPUT", "-p", "udp", "--dport", "9", "-j", "DROP")
			run("", family, "-t", "nat", "-A", "PREROUTING", "-p", "udp", "--dport", "9", "-j", "RETURN")
			saved := run("", family+"-save")
			if strings.Count(saved, "--dport 9") != 2 {
				t.Errorf("saved\n%s", saved)
			}
			run("", family, "-F")
			run("", family, "-t", "nat", "-F")
			run(saved, family+"-restore")
			run(saved, family+"-restore", "--test")
			if again := run("", family+"-save"); strings.Count(again, "--dport 9") != 2 {
				t.Errorf("restored\n%s\nfrom\n%s", again, saved)
			}
			unchanged(s, n, before)
		})
	}
}

// unchanged checks that conenatd's rules have not changed, and that it works.
func unchanged(s *scene, n *nft, before map[string][]rule) {
	s.T.Helper()
	after, err := n.bytecode(s.Gateway.Namespace)
	s.Must(err)
	if d := difference(only(before, " conenat "), only(after, " conenat ")); d != "" {
		s.T.Errorf("conenatd's rules changed: %s", d)
	}
	s.reaches(s.phone, s.PeerSocket(lab.PeerA, 0), s.ext)
	if n := s.Status().Tables.Repaired; n != 0 {
		s.T.Errorf("%d tables were repaired", n)
	}
}

func only(all map[string][]rule, part string) map[string][]rule {
	some := make(map[string][]rule)
	for chain, rules := range all {
		if strings.Contains(chain, part) {
			some[chain] = rules
		}
	}
	return some
}

// likeFirewalld does what firewalld does through its library: it lists in JSON, and
// replaces its table in one transaction.
const likeFirewalld = `
import sys
from nftables.nftables import Nftables

n = Nftables() # 0.9.8 crashes at the end where there are two

def call(*commands):
    rc, out, err = n.json_cmd({"nftables": [{"metainfo": {"json_schema_version": 1}}, *commands]})
    if rc or err:
        sys.exit("%d %s of %s" % (rc, err, commands))
    return out["nftables"] if out else []

listed = call({"list": {"ruleset": {}}})
tables = sorted(o["table"]["family"] + " " + o["table"]["name"] for o in listed if "table" in o)
print("tables", tables)
print("rules", sum("rule" in o for o in listed))

n.set_echo_output(True)
n.set_handle_output(True)
table = {"table": {"family": "inet", "name": "firewalld"}}
def chain(name, **more):
    return {"add": {"chain": dict({"family": "inet", "table": "firewalld", "name": name}, **more)}}
def rule(chain, *expr):
    return {"add": {"rule": {"family": "inet", "table": "firewalld", "chain": chain, "expr": list(expr)}}}
for start in range(3):
    made = call(
        {"add": table}, {"delete": table}, {"add": table},
        chain("filter_INPUT", type="filter", hook="input", prio=10),
        chain("filter_FORWARD", type="filter", hook="forward", prio=10),
        chain("nat_PREROUTING", type="nat", hook="prerouting", prio=-90),
        rule("filter_FORWARD", {"match": {"left": {"ct": {"key": "state"}}, "op": "in", "right": {"set": ["established", "related"]}}}, {"accept": None}),
        rule("filter_FORWARD", {"match": {"left": {"ct": {"key": "status"}}, "op": "in", "right": "dnat"}}, {"accept": None}),
        rule("filter_INPUT", {"match": {"left": {"meta": {"key": "iifname"}}, "op": "==", "right": "lo"}}, {"accept": None}))
    handles = [o["add"]["rule"]["handle"] for o in made if "add" in o and "rule" in o["add"]]
    if len(handles) != 3:
        sys.exit("%d handles: %s" % (len(handles), made))
    call({"delete": {"rule": {"family": "inet", "table": "firewalld", "chain": "filter_INPUT", "handle": handles[2]}}})
call({"delete": table})
n.set_echo_output(False)
rc, out, err = n.cmd("list ruleset")
if rc or err:
    sys.exit("%d %s" % (rc, err))
print("text", out.count("table "))
`

// firewalld's library lists conenatd's rules, and a reload of firewalld leaves them
// alone.
func TestFirewalldsLibraryWorksBeside(t *testing.T) {
	all := eachNFT(t)
	const python = "/usr/bin/python3"
	if !exists(python) {
		debian.Missing(t, "python3 not found: install the Debian package python3")
	}
	for _, f := range features {
		switch f.name {
		case "default", "mapping and hairpin":
		default:
			continue
		}
		t.Run(f.name, func(t *testing.T) {
			s := f.play(t)
			before, err := all[0].bytecode(s.Gateway.Namespace)
			s.Must(err)
			for _, n := range all[:len(suites)] {
				t.Run(n.String(), func(t *testing.T) {
					s := s.in(t)
					out, err := n.python(t, s.Gateway.Namespace, python, likeFirewalld)
					if err != nil {
						t.Fatal(err)
					}
					for _, want := range []string{"'inet conenat'", fmt.Sprintf("rules %d\n", count(before))} {
						if !strings.Contains(out, want) {
							t.Errorf("%q is not in %q", want, out)
						}
					}
					unchanged(s, n, before)
				})
			}
		})
	}
}

// python runs a script with this machine's Python and a release's libnftables. The
// newest C library works for both.
func (n *nft) python(t *testing.T, ns *lab.Namespace, python, script string) (string, error) {
	t.Helper()
	own := t.TempDir()
	for _, dir := range debian.Libs(n.tree) {
		for _, name := range []string{"nftables", "nftnl", "mnl", "jansson", "gmp", "xtables", "edit"} {
			files, err := filepath.Glob(filepath.Join(dir, "lib"+name+".so.*"))
			if err != nil {
				return "", err
			}
			for _, f := range files {
				if err := os.Symlink(f, filepath.Join(own, filepath.Base(f))); err != nil {
					return "", err
				}
			}
		}
	}
	path := append([]string{own}, debian.Libs(n.newest.tree)...)
	path = append(path, debian.Libs("/")...)
	return execute(ns, "", []string{"PYTHONPATH=" + filepath.Join(n.tree, "usr/lib/python3/dist-packages")}, debian.Loader(n.newest.tree),
		"--library-path", strings.Join(path, ":"), python, "-c", script)
}
