package control

import (
	"errors"
	"net/http"
	"net/netip"
	"time"
)

// The paths that the server answers.
const (
	pathStatus      = "/v1/status"
	pathPermissions = "/v1/permissions"
	pathReload      = "/v1/reload"
	pathRevoke      = "/v1/revoke"
	pathFlush       = "/v1/flush"
	pathVerify      = "/v1/verify"
	pathExplain     = "/v1/explain"
	pathWatch       = "/v1/watch"
	pathMetrics     = "/metrics" // the path that Prometheus expects

	// wordParameter may be repeated; see Source.Revoke.
	wordParameter = "word"
	// The parameters of explain.
	peerParameter = "peer"
	extParameter  = "ext"
)

var methods = map[string]string{
	pathStatus:      http.MethodGet,
	pathPermissions: http.MethodGet,
	pathReload:      http.MethodPost,
	pathRevoke:      http.MethodPost,
	pathFlush:       http.MethodPost,
	pathVerify:      http.MethodGet,
	pathExplain:     http.MethodGet,
	pathWatch:       http.MethodGet,
	pathMetrics:     http.MethodGet,
}

// result is the answer to a command.
type result struct {
	Revoked int `json:"revoked"`
}

// A Permission says that Peer may send to Ext from any port and reaches Int
// (RFC 8656, section 9), or why it may not yet.
type Permission struct {
	Int     netip.AddrPort `json:"int"`
	Ext     netip.AddrPort `json:"ext"` // equals Int in a routed subnet
	Peer    netip.Addr     `json:"peer"`
	Peers   netip.Prefix   `json:"peers,omitzero"`    // if the peer is a group or everybody
	Zone    uint16         `json:"zone"`              // conntrack zone of the reply direction of its flows
	State   string         `json:"state"`             // standing, refused or waiting
	Reason  string         `json:"reason,omitempty"`  // why it does not stand, or admits nobody
	Backend string         `json:"backend,omitempty"` // what carries it

	Flows    int `json:"flows"`    // live flows that the inside host opened
	Children int `json:"children"` // live flows that the peer opened
	Answered int `json:"answered"` // children that the inside host answered

	// Both are zero unless the permission stands.
	Since   time.Time `json:"since,omitzero"`
	Expires time.Time `json:"expires,omitzero"` // unless it is refreshed
}

// A Status is what the daemon reports about itself.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`

	Backend         string   `json:"backend"` // what carries permissions
	Helper          Helper   `json:"helper"`
	Subnets         []Subnet `json:"subnets"`
	Outside         []string `json:"outside"`           // outside links
	OutsideIPv6Only []string `json:"outside_ipv6_only"` // those of them that are outside links for IPv6 alone
	// PeerGroups are prefixes of peers that count as one.
	PeerGroups []netip.Prefix `json:"peer_groups"`
	// ExcludePeerPorts are the peer ports that give no permission.
	ExcludePeerPorts []PortRange `json:"exclude_peer_ports"`
	Lifetime         float64     `json:"lifetime_s"` // in seconds
	Accounting       bool        `json:"accounting"` // sysctl nf_conntrack_acct

	Permissions Permissions `json:"permissions"`
	Tables      Tables      `json:"tables"`
	Conntrack   Conntrack   `json:"conntrack"`
	Flows       int         `json:"flows"` // flows that support or belong to permissions
	// BrokenFlows are flows of enabled hosts that, at the last check, left with a source
	// that the user's rules would certainly not give them now.
	BrokenFlows []BrokenFlows `json:"broken_flows"`
	Events      Events        `json:"events"`
	Counters    Counters      `json:"counters"`
	Latency     Latency       `json:"latency"`
	Process     Process       `json:"process"`

	// Warnings are the texts of Findings.
	Warnings []string  `json:"warnings"`
	Findings []Finding `json:"findings"`

	// Verification is present if it was requested.
	Verification *Verification `json:"verification,omitempty"`
}

// A PortRange has its First and its Last port.
type PortRange struct {
	First uint16 `json:"first"`
	Last  uint16 `json:"last"`
}

// A Finding says what does not work, and how to repair it.
type Finding struct {
	ID    string `json:"id"`
	About string `json:"about,omitempty"` // which link, subnet or rule, if there may be several
	Text  string `json:"text"`            // for people
	Fix   string `json:"fix,omitempty"`   // shell command that repairs it, if the daemon knows one
}

// BrokenFlows are flows of a subnet that leave by one link with one source.
type BrokenFlows struct {
	Subnet netip.Prefix `json:"subnet"`
	Link   string       `json:"link"`
	Source netip.Addr   `json:"source,omitzero"` // missing if they are untranslated
	Flows  int          `json:"flows"`
	// CameBack says that the flows came back with this source after they had been ended.
	CameBack bool           `json:"came_back"`
	Int      netip.AddrPort `json:"int"` // of one of them
	Peer     netip.AddrPort `json:"peer"`
}

// A Verification is the result of comparing the daemon's state with the kernel: how many
// permissions stand, how many expectations, map elements and conntrack flows there are, and
// what is wrong.
type Verification struct {
	Permissions  int     `json:"permissions"`
	Expectations int     `json:"expectations"`
	Elements     int     `json:"elements"`
	Flows        int     `json:"flows"`
	Wrong        []Wrong `json:"wrong"`
}

// Wrong is a permission on which daemon and kernel disagree.
type Wrong struct {
	ID    string         `json:"id"`
	Peers netip.Prefix   `json:"peers"`
	Ext   netip.AddrPort `json:"ext"`
}

// Helper names the conntrack helpers on anchors, empty if there is none.
type Helper struct {
	IPv4 string `json:"ipv4"`
	IPv6 string `json:"ipv6"`
}

// A Subnet is an enabled subnet.
type Subnet struct {
	Prefix netip.Prefix `json:"prefix"`
	Routed bool         `json:"routed"` // not translated
	// Filtering says who may send to the mappings of its hosts (RFC 4787 section 5).
	Filtering string `json:"filtering"`
	// Mapping says how its hosts get outside ports (RFC 4787 section 4.1): kernel or
	// endpoint_independent. It is the mapping in force.
	Mapping string  `json:"mapping"`
	Hairpin bool    `json:"hairpin"` // its hosts reach each other by outside endpoints
	Carried Carried `json:"carried"`
	Blocked Blocked `json:"blocked"`
}

// Blocked names the chain of the user's firewall that drops all UDP that hosts of a subnet send outside,
// if there is one.
type Blocked struct {
	Chain string `json:"chain,omitempty"`
	Hook  string `json:"hook,omitempty"` // forward or prerouting
}

// Carried says what carries the permissions of a subnet, and why.
type Carried struct {
	By    string `json:"by"`              // expect, nft or expect+nft
	Why   string `json:"why"`             // an identifier
	Chain string `json:"chain,omitempty"` // the chain of the user's firewall that drops flows
	// Before says that the chain sees packets before conntrack or NAT do.
	Before string `json:"before,omitempty"`
	Error  string `json:"error,omitempty"` // why the user's chains cannot be read
	// Evidence is what the user's firewall did recently with children, if its rules do not
	// tell.
	Evidence []Evidence `json:"evidence,omitempty"`
}

// What Carried.Before says.
const (
	BeforeNAT       = "nat"
	BeforeConntrack = "conntrack"
)

// Evidence is what a firewall did with the last children of one carrier.
type Evidence struct {
	By       string `json:"by"` // expect or nft
	Children uint64 `json:"children"`
	Passed   uint64 `json:"passed"`
}

// Permissions counts permissions by state.
type Permissions struct {
	Standing int `json:"standing"`
	Refused  int `json:"refused"`
	Waiting  int `json:"waiting"`
	Limit    int `json:"limit"` // of standing permissions
	// Expectations is how many stand as expectations, whether they are also in the map or
	// not.
	Expectations int `json:"expectations"`
	// Helped counts pairs of an inside host and a peer between which a conntrack helper of
	// the user's works: there are no expectations, and the map alone carries.
	Helped int `json:"helped"`
}

// Tables are conenatd's own nftables tables.
//
// A tag "counter" is the name in nft of the counter that gives a member its value.
type Tables struct {
	Guard    Guard    `json:"guard"`
	Map      Map      `json:"map"`
	Expected Expected `json:"expected"`
	Mapping  Mapping  `json:"mapping"`
	Repaired uint64   `json:"repaired"` // how often conenatd undid changes that others made to them
}

// Mapping is endpoint-independent mapping, and what its rules have done since the tables
// were made.
type Mapping struct {
	On         bool   `json:"on"`                              // in force, not only configured
	Moved      uint64 `json:"moved" counter:"moved"`           // flows moved to the pool: another host had the outside port
	PoolUsedUp uint64 `json:"pool_used_up"`                    // flows left to the kernel: the pool had no port for them
	Left       uint64 `json:"left" counter:"left_to_rules"`    // flows left to the kernel: something else used the port towards that peer
	Shared     uint64 `json:"shared" counter:"port_shared"`    // flows to which the user's rules gave the outside port of another host's mapping
	Hairpinned uint64 `json:"hairpinned" counter:"hairpinned"` // flows between inside hosts by outside endpoints
	// NotApplied counts, by reason, the live flows that should have a mapping but had none,
	// or another outside endpoint, at the last reconcile.
	NotApplied map[string]uint64 `json:"not_applied"`
}

// Map is the map of permissions. Admitted and Passed count since the daemon started,
// Learned and Limited since the tables were made.
type Map struct {
	On       bool   `json:"on"`
	Learn    bool   `json:"learn"`                           // the kernel adds permissions by itself
	Admitted uint64 `json:"admitted"`                        // first packets of children
	Passed   uint64 `json:"passed"`                          // those of Admitted that the user's firewall let pass
	Learned  uint64 `json:"learned" counter:"learned"`       // permissions that the kernel added
	Limited  uint64 `json:"limited" counter:"learn_limited"` // permissions not learned because of learn_rate
}

// Expected counts the expected flows from outside, including those of the user's own
// conntrack helpers.
type Expected struct {
	Admitted uint64 `json:"admitted"`
	Passed   uint64 `json:"passed"` // those of Admitted that the user's firewall let pass
}

// Guard is what the table of family inet has done.
type Guard struct {
	On       bool   `json:"on"`
	Drops    uint64 `json:"drops" counter:"guard_drops"`         // packets for which the gateway had no socket
	Spoofed  uint64 `json:"spoofed" counter:"spoofed_drops"`     // packets whose source is not reached by the link that they came by
	Children uint64 `json:"children" counter:"child_drops"`      // first packets of expected children beyond max_children
	PortZero uint64 `json:"port_zero" counter:"port_zero_drops"` // packets that look like an anchor, and ICMP errors about one
}

// A Conntrack is the state of the kernel's connection tracking in this network namespace,
// for flows of all protocols, whether conenatd handles them or not: how full its table is,
// and what it has done since the daemon started, summed over all CPUs. "conntrack -S" shows
// the counts since boot for each CPU.
type Conntrack struct {
	Entries int `json:"entries"`
	Max     int `json:"max"` // nf_conntrack_max; 0 is no bound

	InsertFailed  uint64 `json:"insert_failed"`  // packets dropped because their new entry could not be put into the table
	Drop          uint64 `json:"drop"`           // packets dropped: InsertFailed, and those for which there was no new entry
	EarlyDrop     uint64 `json:"early_drop"`     // entries removed to make room in a full table
	Invalid       uint64 `json:"invalid"`        // packets that cannot be tracked
	Error         uint64 `json:"error"`          // ICMP messages that cannot be tracked
	SearchRestart uint64 `json:"search_restart"` // lookups that restarted because the table changed

	// Of all programs and conntrack helpers together.
	ExpectationsMade  uint64 `json:"expectations_made"`
	ExpectationsEnded uint64 `json:"expectations_ended"`
	Expected          uint64 `json:"expected"` // flows that an expectation admitted
}

// Events counts the kernel's messages since the start.
type Events struct {
	Mode       string `json:"mode"`  // which flows the kernel reports when they begin: "all" or "lean"
	Quiet      bool   `json:"quiet"` // whether it hides flows that can have no permission
	Received   uint64 `json:"received"`
	Filtered   uint64 `json:"filtered"` // received, but not of interest
	Malformed  uint64 `json:"malformed"`
	Overruns   uint64 `json:"overruns"`    // each is followed by a dump
	ReadBuffer int    `json:"read_buffer"` // bytes
}

// Counters count decisions since the start. The maps have identifiers as keys.
type Counters struct {
	Decisions
	Healed    uint64            `json:"healed"`     // broken flows that were ended
	AuditLost uint64            `json:"audit_lost"` // records that the audit log does not have
	Repaired  map[string]uint64 `json:"repaired"`   // things missing from the kernel that were restored
	Refused   map[string]uint64 `json:"refused"`
	Revoked   map[string]uint64 `json:"revoked"`
	Skipped   map[string]uint64 `json:"skipped"` // flows that led to no permission
	// SkippedLinks splits up the flows that Skipped counts as not_outside, by the link that
	// leads to the peer.
	SkippedLinks map[string]uint64 `json:"skipped_links"`
	Failed       map[string]uint64 `json:"failed"` // requests that the kernel failed
}

// Decisions are the counters of the model: cone.Decisions must have the same members. Each is a
// metric with the name and the help of its tags.
type Decisions struct {
	Granted   uint64 `json:"granted" metric:"permissions_granted" help:"Permissions granted."`
	Conflicts uint64 `json:"conflicts" metric:"permission_conflicts" help:"Permissions that already had an owner."`
	// With the kernel's own mapping: permissions whose inside endpoint had another
	// permission shortly before, and those among them with a different outside port.
	Compared uint64 `json:"compared" metric:"mappings_compared" help:"Permissions whose inside endpoint had another permission shortly before."`
	Remapped uint64 `json:"remapped" metric:"mappings_changed" help:"Those of mappings_compared with a different outside port."`
	Early    uint64 `json:"early" metric:"early_packets" help:"Packets that came before their permission."`
	Crowded  uint64 `json:"crowded" metric:"children_over_limit" help:"Children beyond max_children, dropped."`
}

// Latency is the time from reading the event to the kernel's acknowledgement of the grant,
// in microseconds.
type Latency struct {
	Count uint64  `json:"count"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	Max   float64 `json:"max_us"`
	Sum   float64 `json:"sum_us"`
	// Buckets are in ascending order. Bounds are exact to a hundredth.
	Buckets []Bucket `json:"buckets"`
}

// A Bucket counts the latencies up to a bound, those of smaller buckets included.
type Bucket struct {
	UpTo  float64 `json:"up_to_us"`
	Count uint64  `json:"count"`
}

// Process is what the daemon uses of the machine; 0 means unknown.
type Process struct {
	Goroutines int    `json:"goroutines"`
	Files      int    `json:"files"`    // open file descriptors
	Resident   uint64 `json:"resident"` // bytes of memory
	Heap       uint64 `json:"heap"`     // bytes of objects, garbage included
}

// failure is the body of an error, and the last line of a list that could not be completed.
type failure struct {
	Error string `json:"error"`
}

// fault converts a failure into the client's error.
func (f failure) fault() error { return errors.New("conenatd answers: " + f.Error) }
