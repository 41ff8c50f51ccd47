package nfnl

import (
	"slices"
	"strings"
)

// OwnHelper is the name prefix of our own helper, a user-space helper (nfnetlink_cthelper)
// that is left disabled, so it never sees a packet.
//
// Helpers are global: when one is unregistered, the kernel removes its expectations in all
// network namespaces (nf_conntrack_helper_unregister). So each namespace has a helper of
// its own, "conenat-" and the end of the namespace's inode number.
const OwnHelper = "conenat"

// KernelHelpers are helpers of the kernel that can be on an anchor, best first. They would
// parse packets, but an anchor never gets one. Our rules recognise children by the helper's
// name, so the last one is the helper that users need most for forwarded UDP.
var KernelHelpers = []string{"RAS", "netbios-ns", "amanda", "tftp"}

// MayAnchor reports whether an anchor may have the conntrack helper of the name.
func MayAnchor(helper string) bool {
	return strings.HasPrefix(helper, OwnHelper) || slices.Contains(KernelHelpers, helper)
}
