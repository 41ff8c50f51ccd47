package doctor

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"

	"github.com/conenatd/conenatd/internal/control"
)

// Facts are what Diagnose knows of a gateway.
type Facts struct {
	// Status is that of the daemon if Running is set. Otherwise it is what a daemon would
	// show at its start (daemon.Examine), and NoStart says why one would not start.
	Status  control.Status
	Running bool
	NoStart string
	// StartFix is the shell command that removes what NoStart says; empty if none is known.
	StartFix string
	Untried  string // why conntrack helpers were not tried; empty if they were, or if a daemon runs
	// Proposed says that no subnet is enabled: those of Status look like inside networks.
	Proposed   bool
	PassedOver []string // if Proposed: the networks that do not look so, and why
	// Start is the command that starts the service that a package installed, if the
	// configuration is its own. With Proposed it also enables the subnets of Status.
	Start    string
	NoLabels bool // the kernel lacks the label of children of the map

	Left        []string // names of nftables tables that a dead daemon left
	Inside      []string // links that lead to the subnets
	Outside4    []string // outside links that have IPv4
	Sysctls     Sysctls
	Rules       Rules
	SharedLinks []string // outside links that share a default route (ECMP)
	Flowtables  []string
	Saved       []Saved
}

// Sysctls are settings of the kernel, by their names with slashes, such as
// "net/ipv4/ip_forward", because names of links may have dots.
type Sysctls map[string]Sysctl

// A Sysctl is one setting.
type Sysctl struct {
	Value    string
	Writable bool // by this process
	ByRoot   bool // not by this process, but by root where it runs
}

// number returns the value of a setting that is a number.
func (s Sysctls) number(name string) (n int, ok bool) {
	v, there := s[name]
	n, err := strconv.Atoi(strings.TrimSpace(v.Value))
	return n, there && err == nil
}

// Rules are what doctor needs of the user's firewall.
type Rules struct {
	Unread string // why it cannot be read; then the rest is empty
	// Tables are the tables that tell which program wrote the rules, as in "inet fw4", and
	// Chains those of their chains that take rules of the user's, as in
	// "ip filter DOCKER-USER".
	Tables, Chains map[string]bool
	// Untranslated are the enabled subnets of which no rule translates anything on a link.
	Untranslated []Translation
	// Random are rules that give each flow of a subnet a random port.
	Random []Translation
	// Untracked are rules that keep UDP packets of enabled subnets from conntrack.
	Untracked []Untracked
}

// An Untracked is what a rule keeps from conntrack: packets of hosts of some subnets, or of their
// peers. A rule may have several.
type Untracked struct {
	Subnets   []netip.Prefix
	FromPeers bool
	Ports     string // to which the packets go, such as "port 5060"; empty for all
	Rule      string // "ip raw PREROUTING handle 4", or "iptables-legacy raw PREROUTING rule 1"
	// Spec are the words that name the rule for iptables-legacy, without its chain; none if only its number does.
	Spec []string
}

// packets names what the rule keeps from conntrack.
func (u *Untracked) packets() string {
	whose := "what hosts of %s send to their peers (%s)"
	if u.FromPeers {
		whose = "what peers send to hosts of %s (%s)"
	}
	ports := "UDP"
	if u.Ports != "" {
		ports = "UDP to " + u.Ports
	}
	return fmt.Sprintf(whose, control.Joined(u.Subnets, ", "), ports)
}

// A Translation is about the source NAT of a subnet on an outside link.
type Translation struct {
	Subnet netip.Prefix
	Link   string
	Rule   string // the text of the rule, if there is one
}

// Saved is a file with rules that contains tables of conenatd.
type Saved struct {
	Path   string
	Tables []string // "inet conenat"
}
