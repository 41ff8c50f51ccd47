package control

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"
)

// Defaults are not worth printing.
const (
	defaultFiltering = "address_dependent"
	defaultMapping   = "kernel"
)

// The screen on which a status that is not verbose should fit.
const screenWidth, screenHeight = 80, 24

// WriteStatus writes a status as text for people, which begins with the verdict. If it is not
// verbose, it fits on a screen of 80 by 24 characters, unless much went wrong that the counters
// tell of: counters that are 0 and some details are left out, and all but a few of many subnets,
// links and warnings, of which the first stay.
func WriteStatus(w io.Writer, verdict string, s Status, verbose bool, now time.Time) error {
	var b strings.Builder
	t := &statusText{s, tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0), verbose}
	t.served(now)
	t.decisions()
	t.tables()
	t.conntrack()
	t.daemon()
	_ = t.out.Flush() // into memory
	_, err := io.WriteString(w, withWarnings(verdict+"\n"+b.String(), s.Warnings, verbose))
	return err
}

// A statusText is a status that is being written, a line for each thing.
type statusText struct {
	Status
	out     *tabwriter.Writer
	verbose bool
}

func (t *statusText) line(name, format string, args ...any) {
	fmt.Fprintf(t.out, name+"\t"+format+"\n", args...)
}

// some is a line that is left out if its count is 0, and more one of details.
func (t *statusText) some(n uint64, name, format string, args ...any) {
	if n > 0 || t.verbose {
		t.line(name, format, args...)
	}
}

func (t *statusText) more(name, format string, args ...any) { t.some(0, name, format, args...) }

// few lists texts, all but the first of many only if the text is verbose.
func (t *statusText) few(all []string) string {
	if !t.verbose {
		all = Few(all)
	}
	return list(all)
}

// served says for which networks the daemon works, and what stands.
func (t *statusText) served(now time.Time) {
	p := t.Permissions
	t.line("conenatd", "%s, pid %d, running for %s", t.Version, t.PID, between(t.Started, now))
	t.line("backend", "%s; helper for IPv4: %s, for IPv6: %s", t.Backend, cmp.Or(t.Helper.IPv4, "none"), cmp.Or(t.Helper.IPv6, "none"))
	t.line("subnets", "%s", t.few(subnetTexts(t.Subnets)))
	for _, c := range carriers(t.Subnets, t.verbose) {
		t.line("carried by", "%s (%s)", c.text, t.few(c.subnets))
	}
	t.line("outside", "%s", t.few(t.Outside))
	if len(t.PeerGroups) > 0 {
		t.line("peer groups", "%s", t.few(texts(t.PeerGroups)))
	}
	t.line("permissions", "%d standing (limit %d, %d as expectations), %d refused, %d waiting for another owner",
		p.Standing, p.Limit, p.Expectations, p.Refused, p.Waiting)
}

// decisions counts what became of flows.
func (t *statusText) decisions() {
	c := t.Counters
	t.more("lifetime", "%v after the inside host was last heard", time.Duration(t.Lifetime*float64(time.Second)))
	t.more("flows", "%d", t.Flows)
	t.more("granted", "%d", c.Granted)
	t.more("revoked", "%s", parts(worded(c.Revoked)))
	t.some(Sum(c.Refused), "refused", "%s", parts(worded(c.Refused)))
	t.some(Sum(c.Skipped), "skipped", "%s", parts(skipped(c)))
	t.some(Sum(c.Failed), "failed", "%s", parts(worded(c.Failed)))
	t.more("conflicts", "%d", c.Conflicts)
	t.more("early packets", "%d", c.Early)
	t.some(c.Crowded+t.Tables.Guard.Children, "child limit", "%s beyond their limit, dropped", manyChildren(c.Crowded+t.Tables.Guard.Children))
}

// tables says what conenatd's own rules did.
func (t *statusText) tables() {
	c := t.Counters
	if t.Tables.Guard.On {
		t.line("guard", "on, dropped %s that nobody waited for, %d with a faked source",
			Several(t.Tables.Guard.Drops, "packet"), t.Tables.Guard.Spoofed)
	} else {
		t.line("guard", "off")
	}
	t.line("map", "%s", describe(t.Tables.Map))
	if x := t.Tables.Expected; x.Admitted > 0 {
		t.line("expected", "%s", letPass(x.Admitted, x.Passed))
	}
	if t.Tables.Mapping.On || t.verbose {
		t.line("mapping", "%s", mapping(t.Tables.Mapping))
	}
	if n := t.Tables.Mapping.NotApplied; len(n) > 0 {
		t.line("not mapped", "%s", NotApplied(n))
	}
	if c.Healed > 0 {
		t.line("healed", "%s that left with another source than your rules give", Several(c.Healed, "flow"))
	}
	if c.AuditLost > 0 {
		t.line("audit log", "%s lost; the log says why", Several(c.AuditLost, "record is", "records are"))
	}
}

func (t *statusText) conntrack() {
	k := t.Conntrack
	t.line("conntrack", "%d of %s entries", k.Entries, most(k.Max))
	t.some(k.EarlyDrop, "  early_drop", "%s out to make room in the full table", Several(k.EarlyDrop, "entry was taken", "entries were taken"))
	t.some(k.InsertFailed, "  insert_failed", "%s dropped because a new entry could not be put into the table: another one has its addresses and ports", packetsWere(k.InsertFailed))
	t.some(k.Drop, "  drop", "%s dropped, these among them, or because there was no room for a new entry", packetsWere(k.Drop))
	t.more("  invalid", "%s and %s cannot be tracked", Several(k.Invalid, "packet"), Several(k.Error, "ICMP message"))
	t.more("  search_restart", "%s began anew because the table changed", Several(k.SearchRestart, "look-up"))
	t.more("  expectations", "%d were made and %d ended, of all programs; they admitted %s", k.ExpectationsMade, k.ExpectationsEnded, Several(k.Expected, "flow"))
}

// daemon is about the process: its events, its memory, and what it repaired.
func (t *statusText) daemon() {
	c, e, l := t.Counters, t.Events, t.Latency
	t.more("port changed", "%d of %d peers saw another outside port than the peer before", c.Remapped, c.Compared)
	t.some(Sum(c.Repaired)+t.Tables.Repaired, "repaired", "%s; tables %s", parts(worded(c.Repaired)), Several(t.Tables.Repaired, "time"))
	if l.Count > 0 && t.verbose {
		t.line("latency", "p50 %s, p99 %s, max %s, from event to kernel", micros(l.P50), micros(l.P99), micros(l.Max))
	}
	switch {
	case e.Mode == "lean":
		t.line("events", "lean: the kernel reports no new flow whose permission it learned, or that can have none")
	case e.Quiet:
		t.line("events", "quiet: the kernel reports no new flow that can have no permission")
	}
	t.more("events", "%d, %d filtered, %d malformed", e.Received, e.Filtered, e.Malformed)
	t.some(e.Overruns, "overruns", "%d (buffer %d KiB)", e.Overruns, e.ReadBuffer>>10)
	t.more("process", "%d MiB of memory (%d MiB of objects), %d goroutines, %d open files",
		t.Process.Resident>>20, t.Process.Heap>>20, t.Process.Goroutines, t.Process.Files)
	if t.Accounting {
		t.more("accounting", "on")
	} else {
		t.line("accounting", "off (nf_conntrack_acct): conenatd cannot tell whether an answered child is still in use")
	}
	if v := t.Verification; v != nil {
		t.line("verified", "%s, %s, %s of the map, %s; %d wrong", Several(v.Permissions, "permission"),
			Several(v.Expectations, "expectation"), Several(v.Elements, "element"), Several(v.Flows, "flow"), len(v.Wrong))
		for _, w := range v.Wrong {
			t.line("wrong", "%v -> %v %s", w.Peers, w.Ext, Words(w.ID))
		}
	}
}

// withWarnings adds warnings to a text, as many as the screen has room for unless it is verbose.
func withWarnings(text string, warnings []string, verbose bool) string {
	if len(warnings) > 0 {
		text += "\nwarnings (\"conenatd doctor\" says what repairs them):\n"
	}
	const others, prompt = 1, 1 // rows
	for i, warning := range warnings {
		next := text + "  " + warning + "\n"
		if rest := len(warnings) - i; !verbose && i > 0 && rows(next)+min(rest-1, others)+prompt > screenHeight {
			text += fmt.Sprintf("  and %d more (--verbose)\n", rest)
			break
		}
		text = next
	}
	return text
}

// A carrier is what carries some subnets, and why.
type carrier struct {
	text    string
	subnets []string
}

// carriers returns what carries each subnet: many subnets together if one thing carries them, unless
// each is asked for.
func carriers(subnets []Subnet, each bool) (all []carrier) {
	each = each || len(Few(subnetTexts(subnets))) == len(subnets)
	for _, n := range subnets {
		if n.Carried.By == "" {
			continue
		}
		text := n.Carried.Text()
		i := slices.IndexFunc(all, func(c carrier) bool { return c.text == text && !each })
		if i < 0 {
			i, all = len(all), append(all, carrier{text: text})
		}
		all[i].subnets = append(all[i].subnets, n.Prefix.String())
	}
	return all
}

// rows is how many rows of a screen a text takes.
func rows(text string) (n int) {
	for line := range strings.Lines(text) {
		n += 1 + max(0, utf8.RuneCountInString(line)-2)/screenWidth
	}
	return n
}

// Few returns the first of many texts, and how many there are more.
func Few(all []string) []string {
	const most = 2
	if len(all) <= most+1 {
		return all
	}
	return append(slices.Clone(all[:most]), fmt.Sprintf("and %d more", len(all)-most))
}

// Joined joins the texts of all.
func Joined[T fmt.Stringer](all []T, between string) string { return strings.Join(texts(all), between) }

func texts[T fmt.Stringer](all []T) []string {
	out := make([]string, len(all))
	for i, x := range all {
		out[i] = x.String()
	}
	return out
}

// Prefixes returns the prefixes of subnets.
func Prefixes(subnets []Subnet) (all []netip.Prefix) {
	for _, s := range subnets {
		all = append(all, s.Prefix)
	}
	return all
}

// subnetTexts names each enabled subnet with what differs from the defaults.
func subnetTexts(all []Subnet) []string {
	texts := make([]string, len(all))
	for i, n := range all {
		texts[i] = n.Prefix.String()
		if n.Routed {
			texts[i] += " (routed)"
		}
		if n.Filtering != "" && n.Filtering != defaultFiltering {
			texts[i] += " (filtering " + n.Filtering + ")"
		}
		if n.Mapping != "" && n.Mapping != defaultMapping {
			texts[i] += " (mapping " + n.Mapping + ")"
		}
		if n.Hairpin {
			texts[i] += " (hairpin)"
		}
	}
	return texts
}

// Sum adds up counts.
func Sum(counts map[string]uint64) (n uint64) {
	for _, c := range counts {
		n += c
	}
	return n
}

// most formats a limit; 0 means that there is none.
func most(n int) string {
	if n == 0 {
		return "any number of"
	}
	return strconv.Itoa(n)
}

// Text says what carries a subnet, and why, for people.
func (c Carried) Text() string {
	text := c.By + ": " + strings.ReplaceAll(Words(c.Why), "CHAIN", cmp.Or(c.Chain, "your firewall"))
	if c.Error != "" {
		text += " (" + c.Error + ")"
	}
	for _, e := range c.Evidence {
		text += fmt.Sprintf("; of the last %s that came by %s it let %d pass", manyChildren(e.Children), e.By, e.Passed)
	}
	return text
}

// mapping says what the mapping rules did.
func mapping(m Mapping) string {
	if !m.On {
		return "the kernel's"
	}
	return fmt.Sprintf("endpoint-independent; %s got a port of the pool, %d found none, %s left to the kernel, %d share the port of another host, %d hairpinned",
		Several(m.Moved, "newcomer"), m.PoolUsedUp, Several(m.Left, "flow was", "flows were"), m.Shared, m.Hairpinned)
}

// NotApplied says how many flows did not get their mapping, and why.
func NotApplied(counts map[string]uint64) string {
	counts = worded(counts)
	var parts []string
	for _, why := range byCount(counts) {
		parts = append(parts, fmt.Sprintf("%d because %s", counts[why], why))
	}
	return fmt.Sprintf("%s did not get their mapping: %s", Several(Sum(counts), "flow"), strings.Join(parts, ", "))
}

// describe says what the map of permissions does, and whether its children get through the
// user's firewall.
func describe(m Map) string {
	if !m.On {
		return "off"
	}
	learn := "the daemon alone adds to it"
	if m.Learn {
		learn = fmt.Sprintf("%s learned by the kernel, %d rate-limited", Several(m.Learned, "permission"), m.Limited)
	}
	if m.Admitted == 0 {
		return learn + "; no child admitted yet"
	}
	return learn + "; " + letPass(m.Admitted, m.Passed)
}

// letPass says how many of the admitted children the user's firewall let pass.
func letPass(admitted, passed uint64) string {
	return fmt.Sprintf("%s, of which the firewall let %d pass", manyChildren(admitted), min(passed, admitted))
}

func list(words []string) string { return cmp.Or(strings.Join(words, ", "), "none") }

// worded returns counts with words for people instead of identifiers.
func worded(counts map[string]uint64) map[string]uint64 {
	out := make(map[string]uint64, len(counts))
	for id, n := range counts {
		out[Words(id)] += n
	}
	return out
}

// parts formats the sum and, the largest first, the counts that are not zero.
func parts(counts map[string]uint64) string {
	if of := reasons(counts); of != "" {
		return fmt.Sprintf("%d (%s)", Sum(counts), of)
	}
	return "0"
}

// reasons formats the counts that are not zero, the largest first.
func reasons(counts map[string]uint64) string {
	var parts []string
	for _, name := range byCount(counts) {
		if n := counts[name]; n > 0 {
			parts = append(parts, fmt.Sprintf("%s: %d", name, n))
		}
	}
	return strings.Join(parts, ", ")
}

// Reasons formats counts by identifier, in words and the largest first, without those that are
// zero.
func Reasons(counts map[string]uint64) string { return reasons(worded(counts)) }

// SkippedReasons formats the flows that led to no permission as Reasons does, and those to
// peers behind other than outside links separately for each link.
func SkippedReasons(c Counters) string { return reasons(skipped(c)) }

// skipped counts flows to peers behind other than outside links separately for each link.
func skipped(c Counters) map[string]uint64 {
	out, all := worded(c.Skipped), Words("not_outside")
	for link, n := range c.SkippedLinks {
		out[fmt.Sprintf("peer is behind %s, which is no outside link", link)] = n
		out[all] -= n // the rest is of links that are not counted separately
	}
	return out
}

// byCount returns the names, sorted by count, the largest first.
func byCount(counts map[string]uint64) []string {
	return slices.SortedFunc(maps.Keys(counts), func(a, b string) int {
		return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b))
	})
}

// micros formats microseconds with a suitable unit.
func micros(us float64) string {
	return time.Duration(us * float64(time.Microsecond)).Round(time.Microsecond).String()
}

// Several returns a number of things: "1 flow", "2 flows". several is the plural, if that is not the
// word with an s.
func Several[N int | uint64](n N, one string, several ...string) string {
	switch {
	case n == 1:
		return "1 " + one
	case len(several) > 0:
		return fmt.Sprintf("%d %s", n, several[0])
	}
	return fmt.Sprintf("%d %ss", n, one)
}

func manyChildren(n uint64) string { return Several(n, "child", "children") }

func packetsWere(n uint64) string { return Several(n, "packet was", "packets were") }
