package probe

import (
	"net/netip"
	"slices"
)

// Behaviours of mapping and filtering, with the words of RFC 4787 sections 4.1 and 5.
const (
	EndpointIndependent     = "endpoint_independent"
	AddressDependent        = "address_dependent"
	AddressAndPortDependent = "address_and_port_dependent"
	NotTranslated           = "none" // mapping alone: there is no NAT
	Unknown                 = "unknown"
)

// A Hairpin says whether a host reaches itself at its outside endpoint.
type Hairpin string

// Hairpinning.
const (
	HairpinYes     Hairpin = "yes"
	HairpinNo      Hairpin = "no"
	HairpinNone    Hairpin = "none" // there is no NAT
	HairpinUnknown Hairpin = Unknown
)

// A Verdict sums up mapping and filtering, with the words of RFC 3489 section 5.
type Verdict string

// Verdicts.
const (
	Open               Verdict = "open"                // no NAT, no filter
	RestrictedFirewall Verdict = "restricted_firewall" // no NAT, and filtering as with RestrictedCone
	SymmetricFirewall  Verdict = "symmetric_firewall"  // no NAT, and filtering as with PortRestrictedCone
	FullCone           Verdict = "full_cone"
	RestrictedCone     Verdict = "restricted_cone"
	PortRestrictedCone Verdict = "port_restricted_cone"
	Symmetric          Verdict = "symmetric"
	Undecided          Verdict = Unknown
	NoAnswer           Verdict = "no_answer"
)

// verdicts are those of each mapping and filtering. Dependent mappings are symmetric whatever
// the filter.
var verdicts = map[[2]string]Verdict{
	{NotTranslated, EndpointIndependent}:           Open,
	{NotTranslated, AddressDependent}:              RestrictedFirewall,
	{NotTranslated, AddressAndPortDependent}:       SymmetricFirewall,
	{EndpointIndependent, EndpointIndependent}:     FullCone,
	{EndpointIndependent, AddressDependent}:        RestrictedCone,
	{EndpointIndependent, AddressAndPortDependent}: PortRestrictedCone,
}

// Classify draws the conclusions from the answers of one address of a server.
func Classify(a *Answers) Result {
	r := Result{
		Family: "ipv6", Server: a.Server.String(), Mapping: Unknown, Filtering: Unknown, Hairpin: HairpinUnknown, Verdict: NoAnswer,
	}
	if a.Server.Addr().Is4() {
		r.Family = "ipv4"
	}
	if a.Inside.IsValid() {
		r.Inside = a.Inside.String()
	}
	if a.Silent != nil {
		r.say(a)
		return r
	}
	if a.Other.IsValid() {
		r.Other = a.Other.String()
	}
	for _, o := range a.Outsides {
		r.Outside = append(r.Outside, o.String())
	}
	r.Mapping, r.Filtering, r.Hairpin = a.mappingBehaviour(), a.filteringBehaviour(), a.Hairpin
	r.Lifetime = a.Lifetime
	r.PortPreserved = a.AtServer.IsValid() && a.AtServer.Port() == a.Local.Port()
	switch verdict, ok := verdicts[[2]string{r.Mapping, r.Filtering}]; {
	case r.Mapping == AddressDependent, r.Mapping == AddressAndPortDependent:
		r.Verdict = Symmetric
	case ok:
		r.Verdict = verdict
	default:
		r.Verdict = Undecided
	}
	r.say(a)
	return r
}

// translated reports whether the server saw another endpoint than this host's own.
func (a *Answers) translated() bool { return a.AtServer != a.Local }

func (a *Answers) mappingBehaviour() string {
	var seen []netip.AddrPort // without repetitions
	for _, e := range []netip.AddrPort{a.AtServer, a.AtHost, a.AtOther, a.AtOnlyPort} {
		if e.IsValid() && !slices.Contains(seen, e) {
			seen = append(seen, e)
		}
	}
	anotherHost := a.Other.Addr() != a.Server.Addr() && (a.AtHost.IsValid() || a.AtOther.IsValid())
	switch {
	case !a.AtServer.IsValid():
		return Unknown
	case len(seen) == 1 && !a.translated():
		return NotTranslated
	case a.AtOnlyPort.IsValid() && a.AtOnlyPort != a.AtServer, a.AtHost.IsValid() && a.AtOther.IsValid() && a.AtHost != a.AtOther:
		return AddressAndPortDependent
	case len(seen) > 1:
		return AddressDependent
	case anotherHost:
		return EndpointIndependent
	}
	return Unknown // of one address that was asked, one endpoint was seen
}

// filteringBehaviour takes silence for a filter's only if the server has shown that it answers
// from there, or if that cannot be seen because each remote endpoint has a mapping of its own.
func (a *Answers) filteringBehaviour() string {
	m := a.mappingBehaviour()
	filtered := func(r, check Reply) bool {
		dependent := m == AddressDependent || m == AddressAndPortDependent
		return r == None && (check == Changed || dependent && check == None)
	}
	byAddress, byPort := filtered(a.FromOther, a.CheckOther), filtered(a.FromPort, a.CheckPort)
	switch {
	case a.FromOther == Changed:
		return EndpointIndependent
	case byPort:
		return AddressAndPortDependent
	case byAddress && a.FromPort == Changed:
		return AddressDependent
	}
	return Unknown
}

// Things beside the verdict that the user should know.
func (a *Answers) notes() (notes []Note) {
	note := func(id, what string) { notes = append(notes, Note{ID: id, What: what}) }
	asked := []Reply{a.FromOther, a.FromPort, a.CheckOther, a.CheckPort}
	otherHost := a.Other.Addr() != a.Server.Addr()
	silentHost := a.Other.IsValid() && otherHost && !a.AtHost.IsValid() && !a.AtOther.IsValid()
	switch {
	case !a.Other.IsValid():
		note("no_other_address", "the server has no other address (OTHER-ADDRESS of RFC 5780), so mapping and filtering cannot be known: "+
			"choose a server with two addresses, such as coturn with two listening-ip")
	case !otherHost:
		note("one_address", "the other address of the server is the same with another port, so whether another address is treated differently "+
			"cannot be known: choose a server with two addresses")
	case silentHost:
		note("other_address_silent", "the other address of the server, "+a.Other.String()+", does not answer: it is down, or wrong, or UDP to it is blocked")
	}
	switch {
	case slices.Contains(asked, Refused) || slices.Contains(asked, Elsewhere):
		note("no_change_request", "the server does not answer from its other address when asked (CHANGE-REQUEST of RFC 5780), so filtering cannot be known: "+
			"choose another server")
	case a.filteringBehaviour() == Unknown && otherHost && !silentHost && a.Other.IsValid():
		note("filtering_unproven", "answers from the other address or port of the server are lost even where this host has sent before, so the reason is "+
			"not a filter for strangers, and filtering cannot be known")
	}
	if a.Asked && a.Lifetime == nil {
		note("no_response_port", "the server does not answer to another port when asked (RESPONSE-PORT of RFC 5780), or this host's sockets have "+
			"different outside addresses, so the lifetime cannot be known")
	}
	if a.Origin.IsValid() && a.Origin != a.Server {
		note("server_translated", "the server calls itself "+a.Origin.String()+": it is behind NAT, or answers with a wrong address, and its other address may be wrong")
	}
	if len(a.Outsides) > 1 {
		note("several_outside_addresses", "sockets of this host had different outside addresses at the same time (RFC 4787 REQ-2): "+
			"programs that use several sockets for one peer may fail")
	}
	if len(a.Outsides) > 0 && a.translated() {
		switch seen := a.Outsides[0]; {
		case slices.Contains(a.Own, seen):
			note("own_translation", "this host itself translates to its address "+seen.String()+": run probe on an inside host to test the gateway")
		case seen.IsPrivate() || shared.Contains(seen):
			note("private_outside", "the server sees the private address "+seen.String()+", so it is in the same network: there may be more NAT on the way to the Internet")
		}
	}
	return notes
}

// shared is for NAT at providers (RFC 6598).
var shared = netip.MustParsePrefix("100.64.0.0/10")
