package config

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Config is a checked configuration. Its zero value is not valid: start with Default,
// Load or Flags.Resolve.
type Config struct {
	// Backend says what carries permissions in the kernel.
	Backend Backend

	// Lifetime is how long a permission lives after the last packet of the inside host, 1 s
	// to 24 h. RFC 4787 REQ-5 asks for 2 minutes or more and recommends 5; RFC 8656 section
	// 9 gives permissions 5 minutes.
	Lifetime time.Duration

	// Reconcile is the interval at which the kernel's state is compared with the desired
	// state, 1 s to 1 h.
	Reconcile time.Duration

	// LogLevel is the lowest level that is logged.
	LogLevel slog.Level

	// LogFormat is the form of the log.
	LogFormat LogFormat

	// AuditLog is the absolute path of the file with the begin and the end of each mapping
	// and child. Empty means none.
	AuditLog string

	// AuditPeers adds the peers to the audit log (RFC 6888 REQ-12).
	AuditPeers bool

	// Outside names links that are outside links although no default route leaves by them.
	// Links with a default route need not be named.
	Outside []string

	// Inside names links that are never outside links, whatever routes and rules there are:
	// packets that come by them with a source in an enabled subnet are from inside.
	Inside []string

	// UplinkMarks marks the flows of the subnets, and their packets, with the link of
	// Outside by which they leave or come, for rules of policy routing.
	UplinkMarks bool

	// UplinkMask has the bits of the mark that encode the link; they are adjacent. In these
	// bits the first link of Outside has the value 1, the second 2.
	UplinkMask uint32

	// PeerGroups holds masked prefixes that do not overlap. A flow to one address of such a
	// prefix permits the whole prefix.
	PeerGroups []netip.Prefix

	// PortPool holds the outside ports for hosts of subnets with endpoint-independent
	// mapping whose own port another host has on the outside. A subnet may have its own
	// pool.
	PortPool PortPool

	// MappingExempt holds masked prefixes. Flows to them are not mapped, because they leave
	// by an outside link without source NAT.
	MappingExempt []netip.Prefix

	// Hairpin lets the hosts of all IPv4 subnets reach hosts with endpoint-independent
	// mapping at their outside endpoints (RFC 4787 REQ-9).
	Hairpin bool

	// HealFlows ends flows of IPv4 subnets that leave untranslated, or with a source
	// address that certainly differs from the one that the user's rules would give them
	// now.
	HealFlows bool

	// Self gives permissions to the gateway's own programs, too: peers that they sent to
	// are RELATED in the input hook. Only expectations carry these permissions.
	Self bool

	// ExcludePeers holds masked prefixes whose addresses get no permission.
	ExcludePeers []netip.Prefix

	// ExcludePeerPorts holds, sorted, the peer ports to which a flow supports no
	// permission. The default is 53, 123 and 443: their servers answer from the port that
	// was asked, and they are most of the UDP flows of a network.
	ExcludePeerPorts []uint16

	// ExcludePorts holds, sorted, the outside ports (ext:P) that never get a permission,
	// because the user forwards them.
	ExcludePorts []uint16

	// MaxPermissions, MaxPermissionsPerSubnet and MaxPermissionsPerHost limit the number of
	// permissions in total, for one subnet and for one inside address; 0 means no limit.
	// The last may be Auto. The sizes of the kernel's tables are limits, too.
	MaxPermissions          int
	MaxPermissionsPerSubnet int
	MaxPermissionsPerHost   int

	// MaxChildren limits the flows that a peer may open by one permission; 0 means no
	// limit, and it may be Auto. One peer must not be able to fill the conntrack table from
	// all its ports.
	MaxChildren int

	// Learn lets the kernel itself add a permission to the nftables map while
	// the first packet of a flow is still inside.
	Learn bool

	// LearnRate is how many permissions per second the kernel learns from one inside
	// address, 1 to 100,000. Bursts may be five times as large. Flows beyond that wait for
	// the daemon.
	LearnRate int

	// Events says which flows the kernel reports when they begin.
	Events Events

	// Quiet keeps the kernel from reporting flows that can have no permission, as long as no
	// other program listens. Lean events imply it.
	Quiet bool

	// Guard drops new UDP packets from outside for which the gateway has no socket, before
	// conntrack makes a flow of them.
	Guard bool

	// Table is the name of our own nftables table.
	Table string

	// OnStop says what happens to the permissions when the daemon stops.
	OnStop OnStop

	// EventBuffer is the receive buffer of the event socket in bytes, 64 KiB
	// to 1 GiB, as given to SO_RCVBUFFORCE (socket(7); the kernel doubles it).
	EventBuffer int

	// ControlSocket is the path of the control socket, absolute and at most 107 bytes
	// (sun_path, unix(7)). Empty means the default for the network namespace, which the
	// caller computes.
	ControlSocket string

	// MetricsListen is where Prometheus may scrape the daemon, in the gateway's network
	// namespace. The zero value means nowhere.
	MetricsListen netip.AddrPort

	// Page says where that listener also serves the page for people.
	Page Page

	// AutoSubnets adds the private prefixes that the caller finds on inside links. They may
	// overlap Subnets, which then takes precedence.
	AutoSubnets bool

	// AutoRouted is Subnet.Routed of the subnets that AutoSubnets adds, which then have IPv6
	// prefixes, too.
	AutoRouted bool

	// Subnets holds the enabled subnets in the given order. They do not overlap.
	Subnets []Subnet

	// LinkSubnets holds links whose connected prefixes are enabled, in the given order. The
	// caller finds the prefixes. Subnets takes precedence.
	LinkSubnets []LinkSubnet
}

// EnablesNone reports whether no subnet can ever be enabled, and the gateway itself is not
// enabled either.
func (c *Config) EnablesNone() bool {
	return len(c.Subnets) == 0 && len(c.LinkSubnets) == 0 && !c.AutoSubnets && !c.Self
}

// A LinkSubnet stands for the prefixes that are connected to a link: the IPv4 prefixes, and
// the IPv6 prefixes, too, if Like is routed.
type LinkSubnet struct {
	Link string
	// Like has the settings for each of the prefixes. Its own prefix is empty.
	Like Subnet
}

// A Subnet is an inside prefix whose hosts get permissions.
type Subnet struct {
	// Prefix is masked, unicast, and neither loopback nor link-local.
	Prefix netip.Prefix

	// Routed lets flows without source NAT support permissions, too: routed IPv4, and
	// normally IPv6.
	Routed bool

	// Filtering says who may send to the mappings of the subnet's hosts (RFC 4787 section
	// 5).
	Filtering Filtering

	// Mapping says how the subnet's flows get their outside endpoints (RFC 4787 section 4).
	// It has no meaning for IPv6.
	Mapping Mapping

	// PortPool replaces Config.PortPool, unless it is empty.
	PortPool PortPool
}

func (s Subnet) mapped() bool { return s.Mapping == EndpointIndependentMapping }

// Pool returns the pool for hosts of a subnet whose own port another host has on the
// outside.
func (c *Config) Pool(s Subnet) PortPool { return cmp.Or(s.PortPool, c.PortPool) }

// Mapping says how flows get their outside endpoints.
type Mapping string

// The mappings that a Config can ask for. The default is empty, so a Subnet need not set
// it.
const (
	KernelMapping              Mapping = ""                     // whatever the kernel's NAT finds free
	EndpointIndependentMapping Mapping = "endpoint_independent" // one for each inside endpoint, shared with no other
)

// String returns the word used in the configuration.
func (m Mapping) String() string { return cmp.Or(string(m), "kernel") }

// A PortPool holds ports as text: sorted ranges separated by commas, or NoPool. An empty
// pool means that the subnet has no pool of its own (Subnet.PortPool).
type PortPool string

// NoPool has no ports: hosts whose own port another host has on the outside are left to the
// user's rules.
const NoPool PortPool = "none"

func (p PortPool) String() string { return string(p) }

// Ranges returns the ranges of a pool, sorted. They do not overlap.
func (p PortPool) Ranges() (all cone.PortRanges) {
	for text := range strings.SplitSeq(string(p), ",") {
		if r, ok := parsePorts(text); ok {
			all = append(all, r)
		}
	}
	return all
}

// Filtering says who may send to a mapping.
type Filtering string

// The filterings that a Config can ask for. The default is empty, so a Subnet need not set
// it.
const (
	AddressDependent        Filtering = ""                           // peers that the host has sent to, from any port
	EndpointIndependent     Filtering = "endpoint_independent"       // anybody: a full cone
	AddressAndPortDependent Filtering = "address_and_port_dependent" // the kernel's own behaviour: no permissions
)

// String returns the word used in the configuration.
func (f Filtering) String() string { return cmp.Or(string(f), "address_dependent") }

// A Backend names what carries permissions in the kernel.
type Backend string

// The backends that a Config can ask for.
const (
	BackendAuto   Backend = "auto"   // the map where possible, expectations where needed
	BackendExpect Backend = "expect" // conntrack expectations
	BackendNFT    Backend = "nft"    // elements of an nftables map
)

// Events says which flows the kernel reports when they begin, as long as no other program
// listens to conntrack; otherwise it reports all. The rest is found in dumps.
type Events string

// The values that a Config can ask for.
const (
	AutoEvents Events = "auto" // lean while such flows begin fast, otherwise all
	AllEvents  Events = "all"
	LeanEvents Events = "lean" // not those whose permission the kernel learned, or that can have none
)

// LogFormat is the form of the log.
type LogFormat string

// The values that a Config can ask for.
const (
	AutoLog    LogFormat = "auto" // whatever suits the standard error stream
	TextLog    LogFormat = "text"
	JSONLog    LogFormat = "json"
	JournalLog LogFormat = "journal" // text behind the priorities of sd-daemon(3)
)

// Page says on which addresses the page for people is served.
type Page string

// Where the page is served.
const (
	PageLoopback   Page = "loopback"
	PageEverywhere Page = "everywhere" // wherever MetricsListen listens
	PageOff        Page = "off"
)

// OnStop says what a stopped daemon leaves in the kernel.
type OnStop string

// The values that a Config can ask for.
const (
	OnStopRevoke OnStop = "revoke" // nothing
	OnStopKeep   OnStop = "keep"   // the permissions, for a new daemon to take over
)

// Default returns the configuration of an empty file. It enables no subnet. The caller owns
// the value and what it points to.
func Default() Config {
	return Config{
		Backend:          BackendAuto,
		Lifetime:         5 * time.Minute,
		Reconcile:        30 * time.Second,
		LogLevel:         slog.LevelInfo,
		LogFormat:        AutoLog,
		ExcludePeerPorts: []uint16{53, 123, 443},

		UplinkMask:            0x0f00_0000,
		PortPool:              "61000-65535",
		MaxPermissionsPerHost: Auto,
		MaxChildren:           Auto,

		Learn:     true,
		LearnRate: 200,
		Events:    AutoEvents,

		Guard:       true,
		Table:       "conenat",
		OnStop:      OnStopRevoke,
		Page:        PageLoopback,
		EventBuffer: 8 << 20,
	}
}

// Auto as a limit means that the size of the conntrack table decides.
const Auto = -1

// The maximum of an Auto limit, and the divisor of the conntrack table's size that gives it
// otherwise.
const (
	mostPerHost, perHostPart   = 4096, 2
	mostChildren, childrenPart = 256, 32
)

// Sized returns c with Auto limits computed for a conntrack table of n entries; 0 means
// that the table is unlimited.
func (c Config) Sized(n int) Config {
	size := func(limit *int, most, part int) {
		if *limit != Auto {
			return
		}
		if *limit = most; n > 0 {
			*limit = min(most, max(n/part, 1))
		}
	}
	size(&c.MaxPermissionsPerHost, mostPerHost, perHostPart)
	size(&c.MaxChildren, mostChildren, childrenPart)
	return c
}

// check finds keys whose values contradict each other.
func (c *Config) check() (key string, err error) {
	if err := c.checkGroups(); err != nil {
		return "peer_groups", err
	}
	for _, name := range c.Inside {
		if slices.Contains(c.Outside, name) {
			return "inside", fmt.Errorf("link %q is one of outside, too: a link is one or the other, so take it out of one of the two", name)
		}
	}
	if c.UplinkMarks {
		for i, name := range c.Outside {
			if slices.Contains(c.Outside[:i], name) {
				return "outside", fmt.Errorf("link %q is there twice: its place is its mark, so take one of them out", name)
			}
		}
		most := int(c.UplinkMask >> bits.TrailingZeros32(c.UplinkMask))
		switch n := len(c.Outside); {
		case n == 0:
			return "uplink_marks", errors.New(`expected the uplinks in outside, such as ["wan0", "wan1"]: the mark of each is its place there`)
		case n > most:
			return "uplink_mask", fmt.Errorf("%#08x has room for %d uplinks, and outside has %d: give it more bits", c.UplinkMask, most, n)
		}
	}
	if c.Self && c.Backend == BackendNFT {
		return "self", errors.New(`only expectations carry permissions of the gateway's own programs, and backend "nft" has none: ` +
			`set backend = "auto" or "expect"`)
	}
	mapped := slices.ContainsFunc(c.Subnets, Subnet.mapped) ||
		slices.ContainsFunc(c.LinkSubnets, func(l LinkSubnet) bool { return l.Like.mapped() })
	if c.Hairpin && !mapped {
		return "hairpin", errors.New(`expected a subnet with mapping = "endpoint_independent": hosts are found by their mappings`)
	}
	return "", nil
}

// A UsageError is one that the user must fix: a wrong file or command line. Starting again
// does not help, so programs exit with UsageStatus.
type UsageError struct{ Err error }

func (e *UsageError) Error() string { return e.Err.Error() }

func (e *UsageError) Unwrap() error { return e.Err }

// NeedsRestart returns the keys that differ and take effect only after a restart.
func NeedsRestart(old, next *Config) (names []string) {
	for _, s := range settings {
		if s.Restart && s.get(old) != s.get(next) {
			names = append(names, s.Name)
		}
	}
	return names
}

// UsageStatus is EX_CONFIG of sysexits.h. It is not 2, because the Go runtime exits with 2
// after a panic.
const UsageStatus = 78

// IsUsage reports whether a UsageError is in the tree of err. All errors of Load and
// Flags.Resolve are usage errors, except for a file that cannot be read: its file system
// may be mounted later.
func IsUsage(err error) bool {
	var u *UsageError
	return errors.As(err, &u)
}

// usage joins errs, except for nil ones, into a UsageError. It returns nil if there are
// none.
func usage(errs ...error) error {
	if err := errors.Join(errs...); err != nil {
		return &UsageError{Err: err}
	}
	return nil
}
