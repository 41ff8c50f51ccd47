//go:build !(386 || arm || mips || mipsle)

package rules

import "errors"

// FailToRead lets the reading of all chains of a table fail from now on, or not.
func FailToRead(r *ForwardReader, table string, fails bool) {
	for _, t := range r.tables {
		t.again = true // as after a change
	}
	r.fail = func(k tableKey, _ string) error {
		if fails && k.String() == table {
			return errors.New("an expression that nobody knows")
		}
		return nil
	}
}
