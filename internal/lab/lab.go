package lab

import (
	"errors"
	"fmt"
	"net/netip"
)

// Options are additions to the standard lab. The zero value is one inside host
// behind a gateway that masquerades IPv4.
type Options struct {
	// Inside is the number of inside hosts, at most 100: 10.47.11.109 and up.
	// Zero means one.
	Inside int
	// Guest adds a second inside network with one host, 10.47.12.20.
	Guest bool
	// IPv6 adds routed, untranslated IPv6 everywhere.
	IPv6 bool
	// Rules is the gateway's rule set in nft's language. Empty means
	// Masquerade; NoRules means none.
	Rules string
}

// Host is a namespace and the addresses by which other hosts reach it.
type Host struct {
	*Namespace
	Addr  netip.Addr
	Addr6 netip.Addr // invalid without Options.IPv6
}

// Lab is a gateway with hosts inside and outside. Its methods may be called
// concurrently, except Close.
type Lab struct {
	Gateway *Host // by its outside address
	Outside *Host // by PeerA and Peer6A; see the peers for its other addresses
	Guest   *Host // nil without Options.Guest

	inside []*Host
	all    []*Host
}

// New makes a lab, in about 50 ms; packets get through at once. The caller must
// Close it. If the privilege or a program is missing, the error is ErrPrivilege or
// names the program.
func New(o Options) (*Lab, error) {
	for _, name := range []string{"ip", "nft", "conntrack"} {
		if _, err := program(name); err != nil {
			return nil, err
		}
	}
	l := new(Lab)
	if err := l.build(o); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

func (l *Lab) build(o Options) error {
	if o.Inside < 0 || o.Inside > 100 {
		return fmt.Errorf("make lab: %d inside hosts: want 0 to 100", o.Inside)
	}
	count := 2 + max(o.Inside, 1)
	if o.Guest {
		count++
	}
	for range count {
		ns, err := newNamespace()
		if err != nil {
			return err
		}
		l.all = append(l.all, &Host{Namespace: ns})
	}
	l.Gateway, l.Outside, l.inside = l.all[0], l.all[1], l.all[2:]
	if o.Guest {
		l.Guest, l.inside = l.inside[0], l.inside[1:]
	}
	if err := l.wire(o.IPv6); err != nil {
		return fmt.Errorf("wire lab: %w", err)
	}
	if o.Rules == "" {
		o.Rules = Masquerade
	}
	return l.NFT(o.Rules)
}

// Inside returns inside host i, counted from 0. It panics when there is none.
func (l *Lab) Inside(i int) *Host { return l.inside[i] }

// Close ends the lab; a second call does nothing. The caller must end sockets and
// processes in it: each keeps its own namespace alive.
func (l *Lab) Close() error {
	var errs []error
	for _, h := range l.all {
		errs = append(errs, h.Close())
	}
	return errors.Join(errs...)
}
