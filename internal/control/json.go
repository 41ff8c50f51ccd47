package control

import "encoding/json"

// MarshalJSON writes an empty list or object instead of null.
func (s Status) MarshalJSON() ([]byte, error) {
	type plain Status // without this method
	s.Subnets, s.Warnings, s.Findings = some(s.Subnets), some(s.Warnings), some(s.Findings)
	s.Outside, s.OutsideIPv6Only = some(s.Outside), some(s.OutsideIPv6Only)
	s.PeerGroups, s.ExcludePeerPorts = some(s.PeerGroups), some(s.ExcludePeerPorts)
	s.BrokenFlows, s.Latency.Buckets = some(s.BrokenFlows), some(s.Latency.Buckets)
	c := &s.Counters
	for _, m := range []*map[string]uint64{&c.Repaired, &c.Refused, &c.Revoked, &c.Skipped, &c.SkippedLinks, &c.Failed, &s.Tables.Mapping.NotApplied} {
		if *m == nil {
			*m = map[string]uint64{}
		}
	}
	return json.Marshal(plain(s))
}

// MarshalJSON writes an empty list instead of null if nothing is wrong.
func (v Verification) MarshalJSON() ([]byte, error) {
	type plain Verification
	v.Wrong = some(v.Wrong)
	return json.Marshal(plain(v))
}

func some[T any](list []T) []T {
	if list == nil {
		return []T{}
	}
	return list
}
