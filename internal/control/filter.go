package control

import (
	"encoding/csv"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strconv"
	"time"
)

// A Filter selects permissions. Its zero value selects all; a permission must match each
// part that is set.
type Filter struct {
	Host, Peer, Subnet netip.Prefix
	State              string
}

// SetHost selects the permissions of a host, or of all hosts of a prefix.
func (f *Filter) SetHost(text string) (err error) {
	f.Host, err = parseAddrs("host", text, "")
	return err
}

// SetPeer selects the permissions that admit an address, or an address of a prefix.
func (f *Filter) SetPeer(text string) (err error) {
	f.Peer, err = parseAddrs("peer", text, "")
	return err
}

// SetSubnet selects the permissions of the hosts of a subnet.
func (f *Filter) SetSubnet(text string) (err error) {
	if _, is := parseAddr(text); is {
		return fmt.Errorf("subnet %q: expected a prefix such as 192.168.1.0/24; --host takes an address", text)
	}
	f.Subnet, err = parseAddrs("subnet", text, "")
	return err
}

// Unserved says of a host or a subnet that f selects that it is in none of the enabled subnets, so
// that it has no permission. Otherwise it returns "".
func (f *Filter) Unserved(enabled []Subnet) string {
	for _, p := range []netip.Prefix{f.Host, f.Subnet} {
		served := func(s Subnet) bool { return s.Prefix.Overlaps(p) }
		if !p.IsValid() || slices.ContainsFunc(enabled, served) {
			continue
		}
		text := Word{Addrs: p}.String() + " is in no enabled subnet"
		if len(enabled) > 0 {
			text += fmt.Sprintf(" (%s)", Joined(Prefixes(enabled), ", "))
		}
		return text + ": enable its network in a [[subnet]] of the configuration"
	}
	return ""
}

// SetState selects the permissions in a state.
func (f *Filter) SetState(text string) error {
	switch text {
	case "standing", "refused", "waiting":
		f.State = text
		return nil
	}
	return fmt.Errorf("state %q: expected standing, refused or waiting", text)
}

// Selects reports whether the filter selects p.
func (f Filter) Selects(p *Permission) bool {
	peers := p.Peers
	if !peers.IsValid() {
		peers = netip.PrefixFrom(p.Peer, p.Peer.BitLen())
	}
	return (!f.Host.IsValid() || f.Host.Contains(p.Int.Addr())) &&
		(!f.Subnet.IsValid() || f.Subnet.Contains(p.Int.Addr())) &&
		(!f.Peer.IsValid() || f.Peer.Overlaps(peers)) &&
		(f.State == "" || f.State == p.State)
}

// csvHeader has the names of the columns: those of the members of a permission
// (docs/control.md).
var csvHeader = []string{
	"int", "ext", "peer", "peers", "zone", "state", "reason", "backend", "flows", "children", "answered", "since", "expires",
}

// A CSVWriter writes permissions as comma-separated values (RFC 4180), after a line with the
// names of the columns.
type CSVWriter struct{ w *csv.Writer }

// NewCSVWriter writes the first line. Errors show in Close.
func NewCSVWriter(w io.Writer) CSVWriter {
	c := CSVWriter{csv.NewWriter(w)}
	_ = c.w.Write(csvHeader)
	return c
}

// Write writes a permission.
func (c CSVWriter) Write(p Permission) error {
	peers := ""
	if p.Peers.IsValid() {
		peers = p.Peers.String()
	}
	at := func(t time.Time) string {
		if t.IsZero() {
			return ""
		}
		return t.Format(time.RFC3339Nano)
	}
	return c.w.Write([]string{
		p.Int.String(), p.Ext.String(), p.Peer.String(), peers, strconv.Itoa(int(p.Zone)), p.State, p.Reason, p.Backend,
		strconv.Itoa(p.Flows), strconv.Itoa(p.Children), strconv.Itoa(p.Answered), at(p.Since), at(p.Expires),
	})
}

// Close writes what is left.
func (c CSVWriter) Close() error {
	c.w.Flush()
	return c.w.Error()
}
