package probe

// Ratings of a use.
const (
	Good    = "good"
	Limited = "limited" // with some peers, or not directly
	Bad     = "bad"
)

// A meaning says what a verdict is for people.
type meaning struct {
	status     int // exit status
	name, what string
	uses
}

// uses say what a host is good for.
type uses struct {
	sip, consoles, webrtc Use
	playstation, xbox     string
}

// A NAT and a firewall that let the same peers answer have the same uses.
var (
	restricted = uses{
		Use{Good, "a proxy that was called may answer from any port."},
		Use{Good, "they can play with nearly everybody."},
		Use{Good, "peers connect directly, those behind symmetric NAT too."},
		"type 2", "moderate",
	}
	portRestricted = uses{
		Use{Limited, "a proxy or gateway that answers from another port than it was called on is not heard."},
		Use{Limited, "they cannot play with those of type 3 (strict)."},
		Use{Limited, "peers connect directly, except for those behind symmetric NAT, which need a relay (TURN)."},
		"type 2", "moderate",
	}
)

// Consoles publish no definition of their types. These are the usual ones: type 1 is without
// NAT, and strict is dependent mapping.
var meanings = map[Verdict]meaning{
	Open: {0, "open", "no NAT and no firewall: everybody reaches this host.", uses{
		Use{Good, "every server and peer can reach the phone."},
		Use{Good, "they can play with everybody."},
		Use{Good, "peers connect directly."},
		"type 1", "open",
	}},
	RestrictedFirewall: {
		0, "no NAT, and a firewall as conenatd gives it",
		"an address that this host has sent to may answer from any port, and no other address may.", restricted,
	},
	SymmetricFirewall: {
		1, "no NAT, and a firewall for all but answers (symmetric firewall)",
		"only the address and port that this host has sent to may answer.", portRestricted,
	},
	FullCone: {0, "full cone NAT", "everybody who knows the outside port of a program reaches it.", uses{
		Use{Good, "every server and peer can reach the phone."},
		Use{Good, "they can play with everybody."},
		Use{Good, "peers connect directly."},
		"type 2", "open",
	}},
	RestrictedCone: {
		0, "restricted cone NAT, as conenatd gives it",
		"an address that this host has sent to may answer from any port, and no other address may.", restricted,
	},
	PortRestrictedCone: {
		1, "port restricted cone NAT, as stock Linux gives it",
		"only the address and port that this host has sent to may answer. On a Linux gateway conenatd lets them answer from any port.", portRestricted,
	},
	Symmetric: {
		2, "symmetric NAT",
		"each remote address sees another outside port, so nobody can be told where to send. On a Linux gateway this comes from a random source NAT, " +
			"or from hosts that share a port; mapping = \"endpoint_independent\" of conenatd cures both.",
		uses{
			Use{Bad, "it works only through a provider that ignores the addresses in messages, and relays media."},
			Use{Bad, "they can play only with those of type 1 (open)."},
			Use{Bad, "most peers need a relay (TURN)."},
			"type 3", "strict",
		},
	},
	Undecided: {1, "not enough is known for a verdict", "the notes below say why.", unknown("not enough is known.")},
	NoAnswer:  {3, "no answer", "", unknown("nothing is known.")},
}

func unknown(why string) uses {
	return uses{Use{Unknown, why}, Use{Unknown, why}, Use{Unknown, why}, Unknown, Unknown}
}

// say adds what the result means.
func (r *Result) say(a *Answers) {
	m := meanings[r.Verdict]
	r.AsConenatd = r.Verdict == RestrictedCone || r.Verdict == RestrictedFirewall
	r.What = m.what
	r.SIP, r.WebRTC = m.sip, m.webrtc
	r.Consoles = Consoles{Use: m.consoles, PlayStation: m.playstation, Xbox: m.xbox}
	r.Notes = []Note{}
	if a.Silent != nil {
		r.What = a.Silent.Error() + "."
		return
	}
	r.Notes = append(r.Notes, a.notes()...)
	if r.Verdict == Undecided && r.Mapping == NotTranslated {
		r.What = "there is no NAT, but whether there is a firewall is not known; the notes below say why."
	}
}

// behaviours are for people.
var behaviours = map[string]map[string]string{
	"mapping": {
		NotTranslated:           "none: the server sees this host's own address and port",
		EndpointIndependent:     "endpoint-independent: all remote endpoints see the same outside port",
		AddressDependent:        "address-dependent: each remote address sees another outside port",
		AddressAndPortDependent: "address- and port-dependent: each remote endpoint sees another outside port",
		Unknown:                 "not known",
	},
	"filtering": {
		EndpointIndependent:     "endpoint-independent: everybody may send",
		AddressDependent:        "address-dependent: addresses sent to may answer from any port",
		AddressAndPortDependent: "address- and port-dependent: only endpoints sent to may answer",
		Unknown:                 "not known",
	},
	"hairpinning": {
		string(HairpinYes):  "yes: inside hosts reach each other at outside endpoints",
		string(HairpinNo):   "no: inside hosts do not reach each other at outside endpoints",
		string(HairpinNone): "there is no NAT",
		Unknown:             "not known",
	},
}
