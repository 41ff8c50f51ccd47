package control

import "reflect"

// Count sets the members of t that have a tag "counter" to the counters with these names.
func (t *Tables) Count(counters map[string]uint64) {
	parts := reflect.ValueOf(t).Elem()
	for i := range parts.NumField() {
		part := parts.Field(i)
		if part.Kind() != reflect.Struct {
			continue
		}
		for j := range part.NumField() {
			if name, ok := part.Type().Field(j).Tag.Lookup("counter"); ok {
				part.Field(j).SetUint(counters[name])
			}
		}
	}
}
