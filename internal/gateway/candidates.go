package gateway

import (
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var private = []netip.Prefix{ // RFC 1918
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
}

// Candidates returns the private IPv4 prefixes (RFC 1918) that look like a LAN
// behind the gateway: connected, by a link that is up, not an outside link, and
// not one of a container or machine host, or a tunnel. It is a proposal for the
// user's subnets, so what is doubtful is left out, and the links of but, by name.
func (n Network) Candidates(but map[string]bool) []netip.Prefix {
	var found []netip.Prefix
	links := n.links()
	for _, a := range n.Addrs {
		l := links[a.Link]
		if !l.Outside && !but[l.Name] && l.lan() && !a.Prefix.IsSingleIP() && covered(a.Prefix, private) {
			found = append(found, a.Prefix.Masked())
		}
	}
	return unique(found)
}

// lanKinds are the kinds of link that a LAN can be behind. All others are
// tunnels, ends of containers and machines, and the like.
var lanKinds = []string{"", "bond", "bridge", "dsa", "macvlan", "openvswitch", "team", "vlan"}

// hostLinks begin the names of links, most of them bridges, behind which are
// containers and machines of the gateway itself.
var hostLinks = []string{
	"cali", "cbr", "cni", "docker", "flannel", "incus", "kube", "lxc", "lxd",
	"nerdctl", "podman", "vboxnet", "veth", "virbr", "vmnet", "vnet", "weave",
}

func (l Link) lan() bool {
	return l.is(unix.IFF_UP) &&
		l.Flags&(unix.IFF_LOOPBACK|unix.IFF_POINTOPOINT|unix.IFF_NOARP) == 0 &&
		slices.Contains(lanKinds, l.Kind) &&
		!slices.ContainsFunc(hostLinks, func(s string) bool { return strings.HasPrefix(l.Name, s) }) &&
		!dockerBridge.MatchString(l.Name)
}

// dockerBridge is the name of a bridge of "docker network create".
var dockerBridge = regexp.MustCompile(`^br-[0-9a-f]{12}$`)
