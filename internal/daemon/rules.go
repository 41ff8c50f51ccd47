package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/rules"
)

// Rules returns the nftables tables that a daemon with this configuration has on this
// gateway, if the kernel has all features that they need: a file that nft loads. Comments in
// it say what was read from the gateway, and what could not be read. Rules changes nothing.
func Rules(cfg config.Config) (string, error) {
	f := &firewall{name: cfg.Table}
	defer func() { _ = f.close() }()
	f.look()
	var ways uplinks
	network, _, err := ways.readNetwork(cfg, f)
	if err != nil {
		return "", err
	}
	if cfg.Subnets, err = f.subnets(cfg, network, nil, nil); err != nil {
		return "", err
	}
	if network, _, err = ways.readNetwork(cfg, f); err != nil { // links to these subnets lead inside
		return "", err
	}
	f.setSides(network)
	size, err := readTableSize()
	if err != nil {
		return "", err
	}
	cfg = cfg.Sized(size)
	f.withMap = wantsMap(cfg)
	if wantsExpect(cfg) {
		helper, err := expect.OwnName(0)
		if err != nil {
			return "", err
		}
		f.helpers = []string{helper}
	}
	read, err := f.readForRules(cfg, network)
	if err != nil {
		return "", err
	}
	outside := network.OutsideLinks()
	f.observe(cfg, outside)
	text, err := rules.Text(cfg.Table, f.desired(cfg, outside))
	if err != nil {
		return "", err
	}
	notes := []string{
		"conenatd's tables, as this configuration makes them on this gateway. A kernel that lacks",
		"something gets fewer rules, and another conntrack helper if it has no cthelper. Elements",
		"that come and go are left out.",
		"outside links: " + cmp.Or(strings.Join(outside, ", "), "none"),
	}
	return comments(append(notes, read...)) + text, nil
}

// comments are lines that nft skips.
func comments(notes []string) string {
	var b strings.Builder
	for _, n := range notes {
		fmt.Fprintf(&b, "# %s\n", strings.ReplaceAll(n, "\n", " "))
	}
	return b.String()
}

// readForRules reads what the rules depend on besides the network: sockets, and the user's
// own rules. It returns notes for the user.
func (f *firewall) readForRules(cfg config.Config, network gateway.Network) (notes []string, err error) {
	var forwarded func(cone.Endpoint) bool
	if len(outsideLinks(network)) > 0 {
		if f.unread != nil {
			note := fmt.Sprintf("your own rules cannot be read (%v): shown as if they forward no port and accept what conenatd lets in", f.unread)
			if errors.Is(f.unread, fs.ErrPermission) {
				note += "; run this as root"
			}
			notes = append(notes, note)
		} else {
			f.forwards(prefixes(cfg.Subnets), network)
			forwarded = f.shared.Covers
		}
	}
	f.decisions = f.decide(cfg, network)
	f.divert(cfg, network)
	if !wantsMapping(cfg) {
		return notes, nil
	}
	if forwarded != nil {
		if f.choosers, err = f.user.PortChoosers(); err != nil {
			return nil, err
		}
		f.sources, f.exempt = f.user.SourceNAT(), f.user.Untranslated()
		_, more := f.differ(cfg, network)
		notes = append(notes, more.texts()...)
	}
	held, err := readPorts(network)
	if err != nil {
		return nil, err
	}
	ports, warnings, err := f.choosePorts(cfg, network, held, false, forwarded)
	f.ports = ports
	return append(notes, warnings.texts()...), err
}

// readTableSize reads how many entries the conntrack table may have; 0 if there is no bound,
// or no conntrack in the kernel yet.
func readTableSize() (int, error) {
	n, err := handover.Read("nf_conntrack_max")
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read the size of the conntrack table: %w", err)
	}
	return n, nil
}
