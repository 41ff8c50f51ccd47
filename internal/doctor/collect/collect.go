// Package collect reads the facts that package doctor judges. It changes nothing.
package collect

import (
	"errors"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/doctor"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Gateway returns the facts of this network namespace, for the status of a daemon that runs,
// or that daemon.Examine returned. The caller adds what is known of the daemon.
func Gateway(st control.Status) (f doctor.Facts, err error) {
	f.Status = st
	f.NoLabels = slices.ContainsFunc(st.Findings, func(d control.Finding) bool { return d.About == string(rules.FeatureLabels) })
	network, err := gateway.ReadNetwork(0, gateway.Sides{Outside: st.Outside, Subnets: control.Prefixes(st.Subnets)})
	if err != nil {
		return f, err
	}
	for _, l := range st.Outside {
		if !slices.Contains(st.OutsideIPv6Only, l) && network.Has4(l) {
			f.Outside4 = append(f.Outside4, l)
		}
	}
	f.SharedLinks = network.SharedDefaults()
	to, err := network.LinksTo(0, control.Prefixes(st.Subnets))
	if err != nil {
		return f, err
	}
	for _, l := range to {
		if l.Name != "" && !slices.Contains(f.Inside, l.Name) {
			f.Inside = append(f.Inside, l.Name)
		}
	}
	f.Sysctls = sysctls("/proc/sys", slices.Concat(st.Outside, f.Inside))
	f.Rules, err = readRules(st, slices.DeleteFunc(slices.Clone(f.Outside4), network.OnlyReceives), sides(st, network, to))
	flowtables, failed := userrules.Flowtables(0)
	f.Flowtables = flowtables
	if err = errors.Join(err, failed); err != nil {
		f.Rules = doctor.Rules{Unread: err.Error()}
	}
	f.Saved = saved("/")
	return f, nil
}

// sysctls reads the settings that doctor knows, also those of the links, below root. A
// setting that the kernel lacks is left out.
func sysctls(root string, links []string) doctor.Sysctls {
	names := []string{
		"net/ipv4/ip_forward", "net/ipv4/conf/all/rp_filter", "net/ipv4/fib_multipath_hash_policy",
		"net/netfilter/nf_conntrack_udp_timeout", "net/netfilter/nf_conntrack_udp_timeout_stream",
		"net/netfilter/nf_conntrack_expect_max", "net/netfilter/nf_conntrack_max",
	}
	for _, l := range links {
		names = append(names, "net/ipv4/conf/"+l+"/forwarding", "net/ipv6/conf/"+l+"/accept_ra", "net/ipv4/conf/"+l+"/rp_filter")
	}
	all := doctor.Sysctls{}
	for _, name := range names {
		path := filepath.Join(root, name)
		text, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err == nil {
			_ = file.Close()
		}
		all[name] = doctor.Sysctl{Value: strings.TrimSpace(string(text)), Writable: err == nil, ByRoot: byRoot(path, err)}
	}
	return all
}

// byRoot reports whether root could have opened the file of a setting that refused with err. In
// other network namespaces than the first one, nobody may write those of the whole machine.
func byRoot(path string, err error) bool {
	info, failed := os.Stat(path)
	return failed == nil && errors.Is(err, fs.ErrPermission) && info.Mode()&0o200 != 0
}

// readRules reads the user's firewall. outside are the outside links by which IPv4 leaves.
func readRules(st control.Status, outside []string, sides userrules.Sides) (r doctor.Rules, err error) {
	reader := userrules.NewReader(userrules.Config{OwnChain: rules.MarkerChain})
	defer func() { err = errors.Join(err, reader.Close()) }()
	rs, err := reader.Read()
	if err != nil {
		return r, err
	}
	r.Tables, r.Chains = map[string]bool{}, map[string]bool{}
	for _, t := range doctor.Tables {
		r.Tables[t] = rs.HasTable(t)
	}
	for _, c := range doctor.Chains {
		r.Chains[c[0]+" "+c[1]] = rs.HasChain(c[0], c[1])
	}
	if rs.SourcesMayBeHidden() {
		return doctor.Rules{}, errors.New("only root and its group may read those of iptables-legacy")
	}
	choosers, err := rs.PortChoosers()
	if err != nil {
		return doctor.Rules{}, err
	}
	r.Untracked = untracked(rs, st, sides)
	all := rs.SourceNAT()
	for _, s := range st.Subnets {
		if s.Routed || s.Prefix.Addr().Is6() {
			continue
		}
		for _, link := range outside {
			of := func(n userrules.SourceNAT) bool {
				return n.LeavesBy(link) && len(n.Within([]netip.Prefix{s.Prefix})) > 0
			}
			if !slices.ContainsFunc(all, of) {
				r.Untranslated = append(r.Untranslated, doctor.Translation{Subnet: s.Prefix, Link: link})
			}
			i := slices.IndexFunc(choosers, func(n userrules.SourceNAT) bool { return n.Random && of(n) })
			if i >= 0 && s.Mapping != "endpoint_independent" {
				r.Random = append(r.Random, doctor.Translation{Subnet: s.Prefix, Link: link, Rule: choosers[i].Text})
			}
		}
	}
	return r, nil
}

// rulesets are the files in which distributions save rules of nftables.
var rulesets = []string{
	"etc/nftables.conf", "etc/nftables.d/*", "etc/nftables/*", "etc/nftables/*/*", "etc/sysconfig/nftables.conf", "etc/nftables.nft",
}

// ourTable matches a table as nft prints it, if it is one of conenatd's. While conenatd runs, nft
// adds a comment with the owner.
var ourTable = regexp.MustCompile(`(?ms)^table (ip|inet) (\S+) \{(?: #[^\n]*)?$(.*?)^\}`)

// saved returns the files below root that contain tables of conenatd.
func saved(root string) (all []doctor.Saved) {
	for _, pattern := range rulesets {
		paths, _ := filepath.Glob(filepath.Join(root, pattern)) // the error is for a bad pattern only
		for _, path := range paths {
			text, err := os.ReadFile(path)
			if err != nil {
				continue // a directory, or another user's
			}
			s := doctor.Saved{Path: path}
			for _, m := range ourTable.FindAllStringSubmatch(string(text), -1) {
				if strings.Contains(m[3], "chain "+rules.MarkerChain+" {") {
					s.Tables = append(s.Tables, m[1]+" "+m[2])
				}
			}
			if len(s.Tables) > 0 {
				all = append(all, s)
			}
		}
	}
	return all
}
