package elements

import "testing"

func TestNamesOfLinksStayApart(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"wan0", "wan-0", "wan.0", "wan_0", "wan 0", "wan@0", "wan:0", "wan0:1", "wan\xff", "\xc3\xbc", "0", "_"} {
		id := Identifier(name)
		if other, is := seen[id]; is {
			t.Errorf("%q and %q are both %s", name, other, id)
		}
		seen[id] = name
		sets := SetsOfLink(name)
		for set, want := range map[string]bool{sets.Kept: true, sets.Moved: true, sets.Ports: false, sets.Addresses: false} {
			if link, ok := LinkOfSet(set); ok != want || ok && link != name {
				t.Errorf("%s is of the link %q: %v", set, link, ok)
			}
		}
	}
}
