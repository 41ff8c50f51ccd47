package control

import "strings"

// prose maps identifiers to the texts that explain them to people.
var prose = map[string]string{
	// Reasons.
	"port_zero":          "port 0",
	"not_unicast":        "peer is not unicast",
	"peer_inside":        "peer is inside",
	"not_outside":        "peer is behind a link that is no outside link",
	"no_route":           "no route to the peer",
	"untranslated":       "not translated",
	"excluded_peer":      "peer is excluded",
	"excluded_peer_port": "peer port is excluded",
	"excluded_port":      "outside port is excluded",
	"filtering":          "filtering of the subnet",
	"conflict":           "another inside host owns this port and peer",
	"forwarded":          "outside port is forwarded",
	"forwarded_here":     "your rule forwards the outside port to it",
	"local_socket":       "gateway serves this port",
	"no_socket":          "no socket of the gateway gets other ports",
	"peers_on_port":      "too many peers on this port",
	"table_full":         "kernel table is full",
	"no_room":            "no room in the conntrack table",
	"taken":              "another entry is in the way",
	"helper":             "a conntrack helper serves this flow",
	"kernel":             "kernel refused",
	"no_backend":         "no backend carries it",
	"host_limit":         "limit per inside host",
	"subnet_limit":       "limit per subnet",
	"total_limit":        "limit of all permissions",
	"revoked":            "revoked by command",
	"idle":               "no packets from inside",
	"dropped":            "your firewall drops what the peer sends",
	"other_zone":         "what the peer sends comes in another conntrack zone",
	"policy":             "not allowed any more",
	"address_gone":       "outside address is gone",
	"rerouted":           "its packets leave by another link now",
	"evicted":            "made room under a limit",

	// What was repaired.
	"elements":   "elements of the map",
	"expect_max": "nf_conntrack_expect_max",

	// What carries a subnet, and why. CHAIN stands for the user's chain that drops flows.
	"dnat_accepted":    "your firewall accepts flows with ct status dnat",
	"related_accepted": "CHAIN drops DNATed flows and accepts RELATED",
	"both_dropped":     "neither gets through: CHAIN drops DNATed and RELATED flows",
	"dnat_dropped":     "CHAIN drops DNATed flows",
	"related_dropped":  "CHAIN drops RELATED flows",
	"cannot_tell":      "whether your firewall accepts DNATed flows cannot be told from its rules",
	"unread":           "your chains of prerouting and forward cannot be read",
	"not_mappable":     "it is routed or of IPv6",
	"only_map":         "only the map can admit everybody",
	"only_backend":     "no other backend is in use",

	// What a verification found.
	"not_in_kernel":       "stands, but not in the kernel",
	"unknown_expectation": "is expected by the kernel, but does not stand",
	"unknown_element":     "is in the map, but does not stand",
	"flows_differ":        "has not the flows that conntrack shows",
	"children_differ":     "has not the children that conntrack shows",

	// Why flows did not get their mapping.
	"address_not_outside": "their outside address is on no outside link",
	"port_in_use":         "the gateway serves their outside port, or you forward it",
	"older_flow":          "they are older than conenatd and have another outside endpoint",
	"old_address":         "they have an outside address that your rules no longer give their hosts",
	"port_shared":         "a rule of yours gave them an outside port that another host has",
	"conntrack_zone":      "a rule of yours puts their answers into a conntrack zone: give the zone to the original direction alone (ct original zone set)",
	"other_endpoint":      "a rule before conenatd's gave them another outside endpoint, or something else used that of the mapping",
}

// Words returns the text that explains an identifier to people.
func Words(id string) string {
	if w, ok := prose[id]; ok {
		return w
	}
	return strings.ReplaceAll(id, "_", " ")
}
