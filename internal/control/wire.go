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

	// wordParameter may be repeated: what Source.Revoke takes.
	wordParameter = "word"
)

var methods = map[string]string{
	pathStatus:      http.MethodGet,
	pathPermissions: http.MethodGet,
	pathReload:      http.MethodPost,
	pathRevoke:      http.MethodPost,
	pathFlush:       http.MethodPost,
	pathVerify:      http.MethodGet,
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
	Peers   netip.Prefix   `json:"peers,omitzero"`    // where the peer is a group, or everybody
	Zone    uint16         `json:"zone"`              // conntrack zone of the reply direction of its flows
	State   string         `json:"state"`             // standing, refused or waiting
	Reason  string         `json:"reason,omitempty"`  // why it does not stand
	Backend string         `json:"backend,omitempty"` // what carries it

	Flows    int `json:"flows"`    // live flows that the inside host opened
	Children int `json:"children"` // live flows that the peer opened
	Answered int `json:"answered"` // children that the inside host answered

	// Both are zero where the permission does not stand.
	Since   time.Time `json:"since,omitzero"`
	Expires time.Time `json:"expires,omitzero"` // unless it is fed again
}

// A Status is what the daemon says of itself.
type Status struct {
	Version string    `json:"version"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`

	Backend    string   `json:"backend"` // what carries permissions
	Helper     Helper   `json:"helper"`
	Subnets    []Subnet `json:"subnets"`
	Outside    []string `json:"outside"`    // outside links
	Lifetime   float64  `json:"lifetime_s"` // in seconds
	Accounting bool     `json:"accounting"` // sysctl nf_conntrack_acct

	Permissions Permissions `json:"permissions"`
	Tables      Tables      `json:"tables"`
	Conntrack   Conntrack   `json:"conntrack"`
	Flows       int         `json:"flows"` // flows that support or belong to permissions
	// BrokenFlows are flows of enabled hosts that leave with a source that the user's rules
	// would surely not give them now, at the last look.
	BrokenFlows []BrokenFlows `json:"broken_flows"`
	Events      Events        `json:"events"`
	Counters    Counters      `json:"counters"`
	Latency     Latency       `json:"latency"`
	Process     Process       `json:"process"`

	// Warnings are the texts of Findings.
	Warnings []string  `json:"warnings"`
	Findings []Finding `json:"findings"`

	// Verification is there where it was asked for.
	Verification *Verification `json:"verification,omitempty"`
}

// A Finding says what does not work, and what would mend it.
type Finding struct {
	ID    string `json:"id"`
	About string `json:"about,omitempty"` // which link, subnet or rule, where there may be several
	Text  string `json:"text"`            // for people
}

// BrokenFlows are flows of a subnet that leave by one link with one source.
type BrokenFlows struct {
	Subnet netip.Prefix `json:"subnet"`
	Link   string       `json:"link"`
	Source netip.Addr   `json:"source,omitzero"` // missing where they are untranslated
	Flows  int          `json:"flows"`
	// CameBack says that they came back with this source when they were ended.
	CameBack bool           `json:"came_back"`
	Int      netip.AddrPort `json:"int"` // of one of them
	Peer     netip.AddrPort `json:"peer"`
}

// A Verification is what a comparison of the daemon with the kernel found: how many
// permissions stand, expectations and elements of the map there are, and flows in
// conntrack; and what is wrong.
type Verification struct {
	Permissions  int     `json:"permissions"`
	Expectations int     `json:"expectations"`
	Elements     int     `json:"elements"`
	Flows        int     `json:"flows"`
	Wrong        []Wrong `json:"wrong"`
}

// Wrong is a permission that the daemon and the kernel do not agree about.
type Wrong struct {
	ID    string         `json:"id"`
	Peers netip.Prefix   `json:"peers"`
	Ext   netip.AddrPort `json:"ext"`
}

// Helper names the conntrack helper on anchors, empty where there is none.
type Helper struct {
	IPv4 string `json:"ipv4"`
	IPv6 string `json:"ipv6"`
}

// A Subnet is an enabled subnet.
type Subnet struct {
	Prefix netip.Prefix `json:"prefix"`
	Routed bool         `json:"routed"` // not translated
	// Filtering is who may send to its mappings (RFC 4787 section 5).
	Filtering string `json:"filtering"`
	// Mapping is how its hosts get outside ports (RFC 4787 section 4.1): kernel or
	// endpoint_independent. It is what is in force.
	Mapping string  `json:"mapping"`
	Hairpin bool    `json:"hairpin"` // its hosts reach each other by outside endpoints
	Carried Carried `json:"carried"`
}

// Carried says what carries the permissions of a subnet, and why.
type Carried struct {
	By    string `json:"by"`              // expect, nft or expect+nft
	Why   string `json:"why"`             // an identifier
	Chain string `json:"chain,omitempty"` // of the user's firewall, that drops flows
	Error string `json:"error,omitempty"` // why his forward chains cannot be read
	// Evidence is what his firewall did lately with children, where its rules do not tell.
	Evidence []Evidence `json:"evidence,omitempty"`
}

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
	Limit    int `json:"limit"` // of those that stand
	// Expectations is how many stand as expectations, in the map as well or not.
	Expectations int `json:"expectations"`
}

// Tables are conenatd's own nftables tables.
type Tables struct {
	Guard    Guard    `json:"guard"`
	Map      Map      `json:"map"`
	Expected Expected `json:"expected"`
	Mapping  Mapping  `json:"mapping"`
	Repaired uint64   `json:"repaired"` // how often others' changes of them were undone
}

// Mapping is endpoint-independent mapping, and what its rules did since the tables
// were made.
type Mapping struct {
	On         bool   `json:"on"`           // in force, not only configured
	Moved      uint64 `json:"moved"`        // to the pool: another one had the outside port
	PoolUsedUp uint64 `json:"pool_used_up"` // flows left to the kernel: the pool had no port for them
	Left       uint64 `json:"left"`         // flows left to the kernel: something else used the port towards that peer
	Shared     uint64 `json:"shared"`       // flows to which the user's rules gave the outside port of another host's mapping
	Hairpinned uint64 `json:"hairpinned"`   // flows between inside hosts by outside endpoints
	// NotApplied counts the live flows that should have a mapping and have none or
	// another outside endpoint, at the last reconcile, by reason.
	NotApplied map[string]uint64 `json:"not_applied"`
}

// Map is the map of permissions, and what it did: since the daemon started it
// admitted children, and since the tables were made it learned.
type Map struct {
	On       bool   `json:"on"`
	Learn    bool   `json:"learn"`    // the kernel adds permissions by itself
	Admitted uint64 `json:"admitted"` // first packets of children
	Passed   uint64 `json:"passed"`   // of these, those that the user's firewall let pass
	Learned  uint64 `json:"learned"`  // permissions that the kernel added
	Limited  uint64 `json:"limited"`  // and those that it did not because of learn_rate
}

// Expected counts the flows from outside that were expected, by conntrack helpers of
// the user's too.
type Expected struct {
	Admitted uint64 `json:"admitted"`
	Passed   uint64 `json:"passed"` // of these, those that the user's firewall let pass
}

// Guard is what the table of family inet does.
type Guard struct {
	On       bool   `json:"on"`
	Drops    uint64 `json:"drops"`     // packets that no socket of the gateway waited for
	Spoofed  uint64 `json:"spoofed"`   // packets with a source that is not by the link that they came by
	Children uint64 `json:"children"`  // first packets of expected children beyond max_children
	PortZero uint64 `json:"port_zero"` // packets like an anchor, and ICMP errors about one
}

// A Conntrack is what the kernel's connection tracking does in this network namespace,
// for flows of all protocols, conenatd's or not: how full its table is, and what it did
// since the daemon started, on all CPUs together. What it did since boot, on each CPU,
// tells conntrack -S.
type Conntrack struct {
	Entries int `json:"entries"`
	Max     int `json:"max"` // nf_conntrack_max; 0 is no bound

	InsertFailed  uint64 `json:"insert_failed"`  // packets dropped because their new entry could not be put into the table
	Drop          uint64 `json:"drop"`           // packets dropped, those among them, and those for which there was no new entry
	EarlyDrop     uint64 `json:"early_drop"`     // entries taken out to make room in a full table
	Invalid       uint64 `json:"invalid"`        // packets that cannot be tracked
	Error         uint64 `json:"error"`          // ICMP messages that cannot be tracked
	SearchRestart uint64 `json:"search_restart"` // look-ups that began anew because the table changed

	// Of all programs and conntrack helpers.
	ExpectationsMade  uint64 `json:"expectations_made"`
	ExpectationsEnded uint64 `json:"expectations_ended"`
	Expected          uint64 `json:"expected"` // flows that an expectation admitted
}

// Events is about the kernel's messages since the start.
type Events struct {
	Received   uint64 `json:"received"`
	Filtered   uint64 `json:"filtered"` // received and not of interest
	Malformed  uint64 `json:"malformed"`
	Overruns   uint64 `json:"overruns"`    // each is followed by a dump
	ReadBuffer int    `json:"read_buffer"` // bytes
}

// Counters count decisions since the start. The maps have identifiers as keys.
type Counters struct {
	Granted   uint64 `json:"granted"`
	Conflicts uint64 `json:"conflicts"` // the permission had an owner
	// Permissions whose inside endpoint had another one a while before, and those among
	// them with another outside port, where the mapping is the kernel's.
	Compared uint64            `json:"compared"`
	Remapped uint64            `json:"remapped"`
	Early    uint64            `json:"early"`    // packets that came before their permission
	Crowded  uint64            `json:"crowded"`  // children beyond max_children, dropped
	Healed   uint64            `json:"healed"`   // broken flows that were ended
	Repaired map[string]uint64 `json:"repaired"` // what was gone from the kernel and put back
	Refused  map[string]uint64 `json:"refused"`
	Revoked  map[string]uint64 `json:"revoked"`
	Skipped  map[string]uint64 `json:"skipped"` // flows that gave no permission
	// SkippedLinks are those that Skipped counts as not_outside, by the link that leads to
	// the peer.
	SkippedLinks map[string]uint64 `json:"skipped_links"`
	Failed       map[string]uint64 `json:"failed"` // requests to the kernel
}

// Latency is from the event read to the grant acknowledged by the kernel, in
// microseconds.
type Latency struct {
	Count uint64  `json:"count"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	Max   float64 `json:"max_us"`
}

// Process is what the daemon takes of the machine; zero is what it cannot tell.
type Process struct {
	Goroutines int    `json:"goroutines"`
	Files      int    `json:"files"`    // open file descriptors
	Resident   uint64 `json:"resident"` // bytes of memory
	Heap       uint64 `json:"heap"`     // bytes of objects, garbage included
}

// failure is the body of an error, and the last line of a list that could not
// be completed.
type failure struct {
	Error string `json:"error"`
}

// fault is a failure as the client's error.
func (f failure) fault() error { return errors.New("conenatd answers: " + f.Error) }
