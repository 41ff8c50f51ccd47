package probe

import (
	"fmt"
	"io"
	"strings"

	"github.com/conenatd/conenatd/internal/text"
)

// A Report is what "conenatd probe" says.
type Report struct {
	Server  string   `json:"server"`  // as it was named, with its port
	Results []Result `json:"results"` // one for each address family, IPv4 first
}

// A Result is about one address of the server.
type Result struct {
	Family        string    `json:"family"` // ipv4 or ipv6
	Server        string    `json:"server"`
	Other         string    `json:"other,omitempty"`
	Inside        string    `json:"inside,omitempty"`
	Outside       []string  `json:"outside,omitempty"`
	PortPreserved bool      `json:"port_preserved"`
	Mapping       string    `json:"mapping"`
	Filtering     string    `json:"filtering"`
	Hairpin       Hairpin   `json:"hairpin"`
	Lifetime      *Lifetime `json:"lifetime,omitempty"`
	Verdict       Verdict   `json:"verdict"`
	AsConenatd    bool      `json:"as_conenatd"` // what conenatd gives without further settings
	What          string    `json:"what"`
	SIP           Use       `json:"sip"`
	Consoles      Consoles  `json:"consoles"`
	WebRTC        Use       `json:"webrtc"`
	Notes         []Note    `json:"notes"`
}

// A Use says how well something works.
type Use struct {
	Rating string `json:"rating"` // Good, Limited, Bad or Unknown
	What   string `json:"what"`
}

// Consoles is a Use with the words of consoles.
type Consoles struct {
	Use
	PlayStation string `json:"playstation"` // type 1, type 2, type 3, or unknown
	Xbox        string `json:"xbox"`        // open, moderate, strict, or unknown
}

// A Note is something beside the verdict.
type Note struct {
	ID   string `json:"id"`
	What string `json:"what"`
}

// Status returns the exit status: 0 if peers can answer from any port, 1 if only in part or if
// that is not known, 2 with a symmetric NAT, 3 without an answer. The worst result counts.
func (r *Report) Status() (status int) {
	for i := range r.Results {
		status = max(status, meanings[r.Results[i].Verdict].status)
	}
	return status
}

// colors are those of each exit status.
var colors = [...]string{"\x1b[32m", "\x1b[33m", "\x1b[31m", "\x1b[31m"}

// Write writes a report for people. With color it has the colours of a terminal.
func (r *Report) Write(w io.Writer, color bool) error {
	var b strings.Builder
	for i := range r.Results {
		if i > 0 {
			b.WriteString("\n")
		}
		r.Results[i].write(&b, color)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r *Result) write(b *strings.Builder, color bool) {
	m := meanings[r.Verdict]
	family := map[string]string{"ipv4": "IPv4", "ipv6": "IPv6"}[r.Family]
	name := m.name
	if color {
		name = colors[m.status] + name + "\x1b[0m"
	}
	fmt.Fprintf(b, "%s: %s\n%s\n", family, name, text.Wrap(r.What, "  "))
	line := func(title, what string) { b.WriteString(text.Wrap(title+": "+what, "  ")) }
	server := r.Server
	if r.Other != "" {
		server += ", which is " + r.Other + " too"
	}
	line("server", server)
	if r.Inside != "" {
		line("this host", r.Inside)
	}
	if r.Verdict == NoAnswer {
		return
	}
	outside := strings.Join(r.Outside, ", ")
	if r.Mapping != NotTranslated && r.PortPreserved {
		outside += ", with the port of the inside"
	}
	line("outside", outside)
	line("mapping", behaviours["mapping"][r.Mapping])
	line("filtering", behaviours["filtering"][r.Filtering])
	line("hairpinning", behaviours["hairpinning"][string(r.Hairpin)])
	if l := r.Lifetime; l != nil {
		line("lifetime", "without packets the way back stays open for "+l.String())
	}
	b.WriteString("\n")
	if r.Verdict != Undecided {
		line("SIP", r.SIP.Rating+": "+r.SIP.What)
		line("consoles", fmt.Sprintf("%s (NAT %s, %s): %s", r.Consoles.Rating, r.Consoles.PlayStation, r.Consoles.Xbox, r.Consoles.What))
		line("WebRTC", r.WebRTC.Rating+": "+r.WebRTC.What)
	}
	for _, n := range r.Notes {
		line("note", n.What)
	}
}
