package daemon

import (
	"fmt"

	"github.com/conenatd/conenatd/internal/control"
)

// A warningID is the identifier of a warning (docs/control.md).
type warningID = string

const (
	warnNoNFTables      warningID = "no_nftables"
	warnFeatureMissing  warningID = "feature_missing" // of the kernel; about names it
	warnOlderTables     warningID = "older_tables_unread"
	warnForwardsUnread  warningID = "forwards_unread"        // about is the table or chain, or empty for all
	warnForwardUnknown  warningID = "forward_not_understood" // about is the rule
	warnForwardsAll     warningID = "all_ports_forwarded"    // about is the rule
	warnRivalChain      warningID = "chain_before_mapping"   // about is the chain
	warnPortsChosen     warningID = "ports_chosen_by_rule"
	warnAddrByOther     warningID = "address_not_by_host" // about is the rule
	warnSourceNATUnread warningID = "source_nat_unread"
	warnSourceNATHidden warningID = "source_nat_hidden"
	warnPoolOverlaps    warningID = "pool_overlaps_local_ports"
	warnPoolMoved       warningID = "pool_moved"
	warnPoolServed      warningID = "pool_ports_served"
	warnPoolForwarded   warningID = "pool_ports_forwarded"
	warnPoolUsedUp      warningID = "pool_used_up"
	warnChainsUnread    warningID = "forward_chains_unread"
	warnChildrenDropped warningID = "children_dropped" // about is the subnet
	warnHostsBlocked    warningID = "hosts_blocked"    // about is the subnet
	warnLeftOut         warningID = "networks_left_out"
	warnHostsKeptIn     warningID = "hosts_kept_in"   // about is the subnet
	warnPacketsInZone   warningID = "packets_in_zone" // about is the subnet
	warnSecondZone      warningID = "second_zone"     // about is the subnet
	warnSeveralZones    warningID = "several_zones"   // about is the subnet
	warnReplyZone       warningID = "zone_of_both"    // about is the subnet
	warnNoCarrier       warningID = "no_carrier"      // about is the subnet
	warnWayBackUnknown  warningID = "way_back_unknown"
	warnLate            warningID = "changes_late"
	warnBackendMissing  warningID = "backend_missing"
	warnPortPerPeer     warningID = "port_per_peer"
	warnLargeGroups     warningID = "large_peer_groups"
	warnNoMapping       warningID = "mapping_not_supported"
	warnNotMapped       warningID = "flows_not_mapped"
	warnLabelTaken      warningID = "label_taken"
	warnEventsOff       warningID = "events_off"
	warnAccountingOff   warningID = "accounting_off"
	warnForwardingOff   warningID = "forwarding_off"       // about is the subnet
	warnLinkMissing     warningID = "outside_link_missing" // about is the link
	warnNoInside        warningID = "no_inside_network"
	warnNoOutside       warningID = "no_outside_link"
	warnNoRoom          warningID = "conntrack_nearly_full"
	warnInsideMissing   warningID = "inside_link_missing"    // about is the link
	warnAssumedOutside  warningID = "link_assumed_outside"   // about is the link
	warnOneArm          warningID = "one_link_to_both_sides" // about is the link
	warnUnusedDefault   warningID = "default_route_inside"   // about is the link and the families
	warnSubnetLink      warningID = "subnet_link_empty"      // about is the link
	warnOwnAddress      warningID = "subnet_is_own_address"  // about is the subnet
	warnUnreached       warningID = "subnet_on_no_link"      // about is the subnet
	warnDown            warningID = "link_down"              // about is the subnet
	warnInsideDown      warningID = "inside_link_down"       // about is the subnet
	warnPeersBehindLink warningID = "peers_behind_link"      // about is the link
	warnOtherArrivals   warningID = "peers_by_other_link"    // about is the link
	warnNoSourceNAT     warningID = "no_source_nat"          // about is the subnet
	warnBrokenFlows     warningID = "broken_flows"           // about is the subnet, the link and the source
	warnNoFiltering     warningID = "filtering_not_open"     // about is the subnet
	warnSubnetOpen      warningID = "subnet_open"            // about is the subnet
	warnIPv6NotRouted   warningID = "ipv6_not_routed"        // about is the subnet
	warnSelf            warningID = "self_not_served"        // about is the family, or empty for both
)

// warnings are sentences for the user that hold at one time, in the order of a status. What one
// is about tells it from others with the same identifier: the numbers in the text may change.
type warnings []control.Finding

func (w *warnings) add(id warningID, about, format string, args ...any) {
	w.addWithFix(id, about, "", format, args...)
}

func (w *warnings) addWithFix(id warningID, about, fix, format string, args ...any) {
	*w = append(*w, control.Finding{ID: id, About: about, Text: fmt.Sprintf(format, args...), Fix: fix})
}

// texts are the sentences alone.
func (w warnings) texts() (all []string) {
	for _, x := range w {
		all = append(all, x.Text)
	}
	return all
}
