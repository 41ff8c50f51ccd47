package mapping

import (
	"testing"
)

func TestMappingThatIsNotInForceIsFoundOut(t *testing.T) {
	type look struct {
		misfits []uint32
		mapped  uint64
		left    uint64 // counted by our rules
		want    bool   // not in force
	}
	for name, looks := range map[string][]look{
		"all is well":            {{nil, 5, 0, false}, {nil, 6, 0, false}},
		"older flows":            {{[]uint32{1, 2, 3, 4, 5}, 1, 0, false}, {[]uint32{1, 2, 3, 4, 5}, 1, 0, false}},
		"a rule before ours":     {{nil, 0, 0, false}, {[]uint32{1, 2, 3}, 1, 0, true}, {[]uint32{1, 2, 3}, 1, 0, true}},
		"and it is gone":         {{nil, 0, 0, false}, {[]uint32{1, 2, 3}, 1, 0, true}, {[]uint32{3}, 9, 0, false}},
		"a rule for a few ports": {{nil, 0, 0, false}, {[]uint32{1, 2, 3}, 50, 0, false}},
		"one after the other":    {{nil, 0, 0, false}, {[]uint32{1}, 0, 0, false}, {[]uint32{2}, 0, 0, false}, {[]uint32{2, 3, 4}, 1, 0, true}},
		"left to the rules":      {{nil, 0, 7, false}, {[]uint32{1, 2, 3}, 1, 10, false}},
		"counted a moment later": {{nil, 0, 0, false}, {[]uint32{1, 2}, 1, 0, false}, {[]uint32{1, 2, 3, 4}, 1, 4, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var last Applied
			for i, l := range looks {
				a := Applied{flows: l.mapped}
				a.misfit(&last, l.misfits)
				a.settle(&last, l.left)
				if a.NotInForce() != l.want {
					t.Errorf("look %d: not in force: %v, want %v: %+v", i, !l.want, l.want, a)
				}
				if a.Sum() != uint64(len(l.misfits)) {
					t.Errorf("look %d: %v", i, a.not)
				}
				last = a
			}
		})
	}
}
